//! A default scope begins its transaction at the first write; `Scope::begin_eagerly` begins it at the first statement.

#[path = "begin_eagerly/defaults.rs"]
mod defaults;
#[path = "begin_eagerly/equivalence.rs"]
mod equivalence;
#[path = "begin_eagerly/program.rs"]
mod program;
#[path = "begin_eagerly/readers.rs"]
mod readers;
#[path = "begin_eagerly/record.rs"]
mod record;
#[path = "begin_eagerly/statements.rs"]
mod statements;
#[path = "begin_eagerly/tracked_rows.rs"]
mod tracked_rows;

use super::*;

const READ_COMMITTED: &str = "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED";

/// MariaDB's default is REPEATABLE READ, under which a default scope begins at its first statement.
fn read_committed(config: Config) -> Config {
    if KIND == Kind::Mariadb { config.connection_init_sql(READ_COMMITTED) } else { config }
}

/// Whether the connection type is the enum.
fn is_enum() -> bool {
    std::any::type_name::<Conn>() == std::any::type_name::<AnyConnection>()
}

/// Whether the session is in a transaction. The session, the pool and the server say the same.
#[track_caller]
fn is_begun(shop: &Shop<Conn>, session: &Session<Conn>) -> bool {
    let begun = session.in_transaction();
    let status = shop.status();
    assert_eq!((status.in_use, shop.in_transaction_now()), (usize::from(begun), begun), "{status}");
    begun
}

/// Runs one statement on another connection, and commits it.
#[track_caller]
fn elsewhere(shop: &Shop<Conn>, sql: &str) {
    assert!(shop.other_connection().write(sql), "{sql}");
}

/// The tables of the model test.
fn model_tables() -> Fixture<Conn> {
    Fixture::sql("model", crate::unit_model::tables::tables(KIND))
}
