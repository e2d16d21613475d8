//! The trait bound of the crate's connections, and the operations that the crate needs beyond Diesel's traits.

use std::any::Any;

use diesel::backend::Backend;
use diesel::connection::{
    Connection, LoadConnection, SimpleConnection, TransactionDepthChange, TransactionManager, TransactionManagerStatus,
};
use diesel::query_builder::{AstPass, Query, QueryBuilder, QueryFragment, QueryId, SqlQuery};
use diesel::query_dsl::methods::LoadQuery;
use diesel::r2d2::R2D2Connection;
use diesel::result::{Error, QueryResult};
use diesel::sql_types::{Nullable, Text};
use diesel::{QueryableByName, RunQueryDsl};
use diesel_migrations::MigrationHarness;

/// A Diesel connection that a [`Database`](crate::Database) can hold: `PgConnection`, `MysqlConnection`,
/// `SqliteConnection`, or an enum of them with `#[derive(diesel::MultiConnection)]`.
///
/// The trait is implemented for every type that satisfies its supertraits. Programs do not implement it.
pub trait SessionConnection:
    R2D2Connection
    + LoadConnection
    + Connection<Backend: Backend<QueryBuilder: 'static> + 'static>
    + MigrationHarness<<Self as Connection>::Backend>
    + Send
    + 'static
    + Inspect
{
}

impl<C> SessionConnection for C where
    C: R2D2Connection
        + LoadConnection
        + Connection<Backend: Backend<QueryBuilder: 'static> + 'static>
        + MigrationHarness<<C as Connection>::Backend>
        + Send
        + 'static
        + Inspect
{
}

/// The SQL of a query, without its bind values. `None` for the backend of an enum of connections, which builds no SQL
/// without a connection.
pub(crate) fn sql_of<DB>(query: &impl QueryFragment<DB>) -> Option<String>
where
    DB: Backend<QueryBuilder: 'static> + 'static,
{
    let (mut builder, backend) = builder_of::<DB>()?;
    query.to_sql(&mut builder, &backend).ok()?;
    Some(builder.finish())
}

/// The query builder of a backend, and the backend itself.
fn builder_of<DB: Backend<QueryBuilder: 'static> + 'static>() -> Option<(DB::QueryBuilder, DB)> {
    let parts = [
        #[cfg(feature = "postgres")]
        known_builder::<diesel::pg::Pg, DB>(),
        #[cfg(feature = "mysql")]
        known_builder::<diesel::mysql::Mysql, DB>(),
        #[cfg(feature = "sqlite")]
        known_builder::<diesel::sqlite::Sqlite, DB>(),
    ];
    parts.into_iter().flatten().next()
}

/// The result is `None` unless `DB` is `Known`.
fn known_builder<Known, DB>() -> Option<(DB::QueryBuilder, DB)>
where
    Known: Backend<QueryBuilder: Default + 'static> + Default + 'static,
    DB: Backend<QueryBuilder: 'static> + 'static,
{
    let mut parts = Some((Known::QueryBuilder::default(), Known::default()));
    (&mut parts as &mut dyn Any).downcast_mut::<Option<(DB::QueryBuilder, DB)>>()?.take()
}

/// A row of a query with one text column, `value`.
#[derive(QueryableByName)]
#[allow(missing_debug_implementations, unreachable_pub)]
pub struct TextRow {
    #[diesel(sql_type = Nullable<Text>)]
    value: Option<String>,
}

/// A query for one text that Diesel keeps prepared: every further execution on the same connection is one round trip.
#[derive(Debug, Clone, Copy)]
#[allow(unreachable_pub)]
pub struct FixedText(&'static str);

impl Query for FixedText {
    type SqlType = Nullable<Text>;
}

/// Diesel identifies the query by its text.
impl QueryId for FixedText {
    type QueryId = ();
    const HAS_STATIC_QUERY_ID: bool = false;
}

impl<DB: Backend> QueryFragment<DB> for FixedText {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, DB>) -> QueryResult<()> {
        out.push_sql(self.0);
        Ok(())
    }
}

impl<C> RunQueryDsl<C> for FixedText {}

/// The operations on a connection that the library needs beyond Diesel's public traits. Programs cannot name the trait,
/// so it is sealed.
#[allow(unreachable_pub)]
pub trait Inspect: SimpleConnection {
    /// The column `value` of every row, a text that may be NULL.
    fn texts(&mut self, sql: &str) -> QueryResult<Vec<Option<String>>>;

    /// The only column of the only row of a constant query, which stays prepared on the connection.
    fn fixed_text(&mut self, sql: &'static str) -> QueryResult<Option<String>>;

    /// Diesel's transaction depth. `None` if Diesel's transaction manager is in its error state.
    fn depth(&mut self) -> Option<u32>;

    /// Sends `sql`, which begins a transaction, and increases Diesel's depth.
    fn begin_with(&mut self, sql: &str) -> QueryResult<()>;

    /// Sends `sql`, which ends the innermost level, and decreases Diesel's depth.
    fn end_with(&mut self, sql: &str) -> QueryResult<()>;

    /// Commits with `sql`, a guard statement and a `COMMIT`. If the database refuses the guard statement, which
    /// `was_refused` determines, the transaction stays open.
    fn commit_with(&mut self, sql: &str, was_refused: &dyn Fn(&Error, Option<u32>) -> bool) -> QueryResult<()>;

    /// Sends `sql`, which ends the transaction, and sets Diesel's depth to 0.
    fn leave_with(&mut self, sql: &str) -> QueryResult<()>;

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
    FixedText: for<'q> LoadQuery<'q, C, Option<String>>,
{
    fn texts(&mut self, sql: &str) -> QueryResult<Vec<Option<String>>> {
        let rows: Vec<TextRow> = diesel::sql_query(sql).load(self)?;
        Ok(rows.into_iter().map(|row| row.value).collect())
    }

    fn fixed_text(&mut self, sql: &'static str) -> QueryResult<Option<String>> {
        FixedText(sql).get_result(self)
    }

    fn depth(&mut self) -> Option<u32> {
        let status = <C::TransactionManager as TransactionManager<C>>::transaction_manager_status_mut(self);
        status.transaction_depth().ok().map(|depth| depth.map_or(0, |levels| levels.get()))
    }

    fn begin_with(&mut self, sql: &str) -> QueryResult<()> {
        self.batch_execute(sql)?;
        change_depth(self, TransactionDepthChange::IncreaseDepth)
    }

    fn end_with(&mut self, sql: &str) -> QueryResult<()> {
        self.batch_execute(sql)?;
        change_depth(self, TransactionDepthChange::DecreaseDepth)
    }

    fn commit_with(&mut self, sql: &str, was_refused: &dyn Fn(&Error, Option<u32>) -> bool) -> QueryResult<()> {
        let Err(commit_error) = self.batch_execute(sql) else {
            // The driver may have detected the end of the transaction itself.
            return match self.depth() {
                Some(0) => Ok(()),
                _ => change_depth(self, TransactionDepthChange::DecreaseDepth),
            };
        };
        let depth = self.depth();
        if depth.is_none_or(|depth| depth == 0) || was_refused(&commit_error, depth) {
            return Err(commit_error);
        }
        // Diesel's own commit rolls back in the same way.
        match self.rollback_level() {
            Ok(()) => Err(commit_error),
            Err(rollback_error) => Err(Error::RollbackErrorOnCommit {
                rollback_error: Box::new(rollback_error),
                commit_error: Box::new(commit_error),
            }),
        }
    }

    fn leave_with(&mut self, sql: &str) -> QueryResult<()> {
        self.batch_execute(sql)?;
        while self.depth().is_some_and(|depth| depth > 0) {
            change_depth(self, TransactionDepthChange::DecreaseDepth)?;
        }
        Ok(())
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

fn change_depth<C: Connection>(conn: &mut C, change: TransactionDepthChange) -> QueryResult<()> {
    match <C::TransactionManager as TransactionManager<C>>::transaction_manager_status_mut(conn) {
        TransactionManagerStatus::Valid(status) => status.change_transaction_depth(change),
        TransactionManagerStatus::InError => Err(Error::BrokenTransactionManager),
    }
}
