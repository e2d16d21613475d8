//! The one trait bound of the crate, and the few things it has to ask any connection.

use diesel::connection::{
    Connection, LoadConnection, TransactionDepthChange, TransactionManager, TransactionManagerStatus,
};
use diesel::query_builder::SqlQuery;
use diesel::query_dsl::methods::LoadQuery;
use diesel::r2d2::R2D2Connection;
use diesel::result::QueryResult;
use diesel::sql_types::{Nullable, Text};
use diesel::{QueryableByName, RunQueryDsl};
use diesel_migrations::MigrationHarness;

/// A Diesel connection that a [`Database`](crate::Database) can hold: `PgConnection`, `MysqlConnection`,
/// `SqliteConnection`, or an enum of them with `#[derive(diesel::MultiConnection)]`.
///
/// It is implemented for every type that has what it asks for; there is nothing to implement.
pub trait SessionConnection:
    R2D2Connection + LoadConnection + MigrationHarness<<Self as Connection>::Backend> + Send + 'static + Inspect
{
}

impl<C> SessionConnection for C where
    C: R2D2Connection + LoadConnection + MigrationHarness<<C as Connection>::Backend> + Send + 'static + Inspect
{
}

/// One text column, whatever the query.
#[derive(QueryableByName)]
#[allow(missing_debug_implementations, unreachable_pub)]
pub struct TextRow {
    #[diesel(sql_type = Nullable<Text>)]
    value: Option<String>,
}

/// What the library asks of a connection beyond Diesel's public traits. Sealed by being unreachable.
#[allow(unreachable_pub)]
pub trait Inspect {
    /// The column `value` (text, may be NULL) of every row.
    fn texts(&mut self, sql: &str) -> QueryResult<Vec<Option<String>>>;

    /// Diesel's own count of open transaction levels; `None` when its manager gave up.
    fn depth(&mut self) -> Option<u32>;

    /// Sends `sql`, which begins a transaction, and tells Diesel so.
    fn begin_with(&mut self, sql: &str) -> QueryResult<()>;

    /// Begins one more level.
    fn begin_level(&mut self) -> QueryResult<()>;

    /// Commits or releases the innermost level.
    fn commit_level(&mut self) -> QueryResult<()>;

    /// Rolls the innermost level back.
    fn rollback_level(&mut self) -> QueryResult<()>;
}

impl<C> Inspect for C
where
    C: Connection + LoadConnection,
    SqlQuery: for<'q> LoadQuery<'q, C, TextRow>,
{
    fn texts(&mut self, sql: &str) -> QueryResult<Vec<Option<String>>> {
        let rows: Vec<TextRow> = diesel::sql_query(sql).load(self)?;
        Ok(rows.into_iter().map(|row| row.value).collect())
    }

    fn depth(&mut self) -> Option<u32> {
        let status = <C::TransactionManager as TransactionManager<C>>::transaction_manager_status_mut(self);
        status.transaction_depth().ok().map(|depth| depth.map_or(0, |levels| levels.get()))
    }

    fn begin_with(&mut self, sql: &str) -> QueryResult<()> {
        self.batch_execute(sql)?;
        match <C::TransactionManager as TransactionManager<C>>::transaction_manager_status_mut(self) {
            TransactionManagerStatus::Valid(status) => {
                status.change_transaction_depth(TransactionDepthChange::IncreaseDepth)
            }
            TransactionManagerStatus::InError => Err(diesel::result::Error::BrokenTransactionManager),
        }
    }

    fn begin_level(&mut self) -> QueryResult<()> {
        <C::TransactionManager as TransactionManager<C>>::begin_transaction(self)
    }

    fn commit_level(&mut self) -> QueryResult<()> {
        <C::TransactionManager as TransactionManager<C>>::commit_transaction(self)
    }

    fn rollback_level(&mut self) -> QueryResult<()> {
        <C::TransactionManager as TransactionManager<C>>::rollback_transaction(self)
    }
}
