//! One UPDATE of several rows with different values, and the locks of several rows.

use std::fmt;
use std::iter::zip;

use diesel::RunQueryDsl;
use diesel::backend::Backend;
use diesel::expression::{AsExpression, TypedExpressionType};
use diesel::query_builder::{AstPass, Query, QueryFragment, QueryId};
use diesel::query_source::Column;
use diesel::result::QueryResult;
use diesel::sql_types::{Bool, Integer, SqlType};

/// Maximum number of rows of one UPDATE, for rows of `values` values. A statement of more than a few hundred rows is
/// not faster.
#[doc(hidden)]
pub const fn max_update_rows(values: usize, binds: usize) -> usize {
    match binds.checked_div(values) {
        Some(rows) if rows < 500 => rows,
        _ => 500,
    }
}

/// `WITH rows AS (SELECT .. FOR NO KEY UPDATE) UPDATE .. FROM rows RETURNING`. The statement returns the index of each
/// row that was found.
///
/// The UPDATE alone would lock the rows in the order of its join, which differs from session to session. Two sessions
/// could then deadlock, whatever the order in which the program writes. `FOR NO KEY UPDATE` is the lock of an UPDATE
/// that changes no key.
///
/// The statement returns indices instead of keys, because the database may spell a key differently than the program.
/// Only the database compares keys here. Values are bound with the types of their columns, so the list needs no casts.
#[doc(hidden)]
pub struct UpdateMany<'a, T, DB> {
    table: T,
    rows: usize,
    keys: Vec<UpdateColumn<'a, DB>>,
    sets: Vec<UpdateColumn<'a, DB>>,
    version: Option<UpdateColumn<'a, DB>>,
}

/// A column and its value for each row.
struct UpdateColumn<'a, DB> {
    name: &'static str,
    /// The column, qualified by its table.
    column: Box<dyn QueryFragment<DB> + 'a>,
    values: Box<dyn ColumnValues<DB> + 'a>,
}

impl<'a, T, DB: Backend> UpdateMany<'a, T, DB> {
    pub fn new(table: T, rows: usize) -> Self {
        Self { table, rows, keys: Vec::new(), sets: Vec::new(), version: None }
    }

    /// Adds a column of the key.
    pub fn key<C, V>(&mut self, column: C, values: impl Iterator<Item = V>)
    where
        C: Column<SqlType: SqlType + TypedExpressionType> + QueryFragment<DB> + 'a,
        V: AsExpression<C::SqlType, Expression: QueryFragment<DB> + 'a>,
    {
        self.keys.push(update_column(column, values));
    }

    /// Adds the version column, with the present version of each row.
    pub fn version<C, V>(&mut self, column: C, values: impl Iterator<Item = V>)
    where
        C: Column<SqlType: SqlType + TypedExpressionType> + QueryFragment<DB> + 'a,
        V: AsExpression<C::SqlType, Expression: QueryFragment<DB> + 'a>,
    {
        self.version = Some(update_column(column, values));
    }

    /// Adds a column to set.
    pub fn set<C, V>(&mut self, column: C, values: impl Iterator<Item = V>)
    where
        C: Column<SqlType: SqlType + TypedExpressionType> + QueryFragment<DB> + 'a,
        V: AsExpression<C::SqlType, Expression: QueryFragment<DB> + 'a>,
    {
        self.sets.push(update_column(column, values));
    }
}

fn update_column<'a, DB, C, V>(column: C, values: impl Iterator<Item = V>) -> UpdateColumn<'a, DB>
where
    DB: Backend,
    C: Column<SqlType: SqlType + TypedExpressionType> + QueryFragment<DB> + 'a,
    V: AsExpression<C::SqlType, Expression: QueryFragment<DB> + 'a>,
{
    let values: Vec<_> = values.map(AsExpression::as_expression).collect();
    UpdateColumn { name: C::NAME, column: Box::new(column), values: Box::new(values) }
}

/// The values of one column. The trait hides their type, which differs between columns.
trait ColumnValues<DB: Backend> {
    fn walk<'b>(&'b self, row: usize, out: AstPass<'_, 'b, DB>) -> QueryResult<()>;
}

impl<E: QueryFragment<DB>, DB: Backend> ColumnValues<DB> for Vec<E> {
    fn walk<'b>(&'b self, row: usize, out: AstPass<'_, 'b, DB>) -> QueryResult<()> {
        self[row].walk_ast(out)
    }
}

/// The name of the common table expression. PostgreSQL refuses the statement if the updated table has the same name.
const ROWS: &str = "diesel_session_rows";

/// The name of the `VALUES` list.
const VALUES: &str = "diesel_session_values";

fn push_list_column<DB: Backend>(out: &mut AstPass<'_, '_, DB>, list: &str, number: usize) -> QueryResult<()> {
    out.push_identifier(list)?;
    out.push_sql(".");
    out.push_identifier(&format!("column{number}"))
}

/// Writes `FROM table, (VALUES ..) WHERE .. ORDER BY .. FOR ..`, which locks the rows in the order of their keys. The
/// first value of each list row is its index. The values of the conditions and of the set columns follow.
fn push_locked_rows<'a: 'b, 'b, T: QueryFragment<DB>, DB: Backend>(
    table: &'b T,
    rows: usize,
    keys: &'b [UpdateColumn<'a, DB>],
    version: Option<&'b UpdateColumn<'a, DB>>,
    sets: &'b [UpdateColumn<'a, DB>],
    clause: &str,
    out: &mut AstPass<'_, 'b, DB>,
) -> QueryResult<()> {
    let conditions = || keys.iter().chain(version);
    out.push_sql(" FROM ");
    table.walk_ast(out.reborrow())?;
    out.push_sql(", (VALUES ");
    for row in 0..rows {
        out.push_sql(if row == 0 { "(" } else { "), (" });
        out.push_sql(&row.to_string());
        for column in conditions().chain(sets) {
            out.push_sql(", ");
            column.values.walk(row, out.reborrow())?;
        }
    }
    out.push_sql(")) AS ");
    out.push_identifier(VALUES)?;
    for (number, condition) in zip(2.., conditions()) {
        out.push_sql(if number == 2 { " WHERE " } else { " AND " });
        condition.column.walk_ast(out.reborrow())?;
        out.push_sql(" = ");
        push_list_column(out, VALUES, number)?;
    }
    for (number, key) in keys.iter().enumerate() {
        out.push_sql(if number == 0 { " ORDER BY " } else { ", " });
        key.column.walk_ast(out.reborrow())?;
    }
    out.push_sql(clause);
    Ok(())
}

impl<T: QueryFragment<DB>, DB: Backend> QueryFragment<DB> for UpdateMany<'_, T, DB> {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, DB>) -> QueryResult<()> {
        // Every number of rows and every set of columns makes another statement, so the statements are not cached.
        out.unsafe_to_cache_prepared();
        let conditions = || self.keys.iter().chain(&self.version);
        out.push_sql("WITH ");
        out.push_identifier(ROWS)?;
        out.push_sql(" AS (SELECT ");
        out.push_identifier(VALUES)?;
        out.push_sql(".*");
        push_locked_rows(
            &self.table,
            self.rows,
            &self.keys,
            self.version.as_ref(),
            &self.sets,
            " FOR NO KEY UPDATE",
            &mut out,
        )?;
        out.push_sql(") UPDATE ");
        self.table.walk_ast(out.reborrow())?;
        let first_set = 2 + conditions().count();
        for (number, set) in self.sets.iter().enumerate() {
            out.push_sql(if number == 0 { " SET " } else { ", " });
            out.push_identifier(set.name)?;
            out.push_sql(" = ");
            push_list_column(&mut out, ROWS, first_set + number)?;
        }
        if let Some(version) = &self.version {
            out.push_sql(", ");
            out.push_identifier(version.name)?;
            out.push_sql(" = ");
            version.column.walk_ast(out.reborrow())?;
            out.push_sql(" + 1");
        }
        out.push_sql(" FROM ");
        out.push_identifier(ROWS)?;
        for (number, condition) in zip(2.., conditions()) {
            out.push_sql(if number == 2 { " WHERE " } else { " AND " });
            condition.column.walk_ast(out.reborrow())?;
            out.push_sql(" = ");
            push_list_column(&mut out, ROWS, number)?;
        }
        out.push_sql(" RETURNING ");
        push_list_column(&mut out, ROWS, 1)
    }
}

/// A SELECT that locks rows in the order of their keys.
#[doc(hidden)]
pub struct LockRows<'a, T, DB> {
    table: T,
    rows: usize,
    keys: Vec<UpdateColumn<'a, DB>>,
    clause: &'static str,
}

impl<'a, T, DB: Backend> LockRows<'a, T, DB> {
    pub fn new(table: T, rows: usize, for_delete: bool) -> Self {
        let clause = if for_delete { " FOR UPDATE" } else { " FOR NO KEY UPDATE" };
        Self { table, rows, keys: Vec::new(), clause }
    }

    /// Adds a column of the key.
    pub fn key<C, V>(&mut self, column: C, values: impl Iterator<Item = V>)
    where
        C: Column<SqlType: SqlType + TypedExpressionType> + QueryFragment<DB> + 'a,
        V: AsExpression<C::SqlType, Expression: QueryFragment<DB> + 'a>,
    {
        self.keys.push(update_column(column, values));
    }
}

impl<T: QueryFragment<DB>, DB: Backend> QueryFragment<DB> for LockRows<'_, T, DB> {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, DB>) -> QueryResult<()> {
        out.unsafe_to_cache_prepared();
        out.push_sql("SELECT ");
        push_list_column(&mut out, VALUES, 1)?;
        push_locked_rows(&self.table, self.rows, &self.keys, None, &[], self.clause, &mut out)
    }
}

impl<T, DB> QueryId for LockRows<'_, T, DB> {
    type QueryId = ();
    const HAS_STATIC_QUERY_ID: bool = false;
}

impl<T, DB, C> RunQueryDsl<C> for LockRows<'_, T, DB> {}

impl<T, DB> fmt::Debug for LockRows<'_, T, DB> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockRows").field("rows", &self.rows).finish_non_exhaustive()
    }
}

/// A query whether the role may update a column of the table. Without this privilege it may not lock rows.
#[doc(hidden)]
#[derive(Debug)]
pub struct MayLock<T>(pub T);

impl<T: QueryFragment<DB>, DB: Backend> QueryFragment<DB> for MayLock<T> {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, DB>) -> QueryResult<()> {
        out.unsafe_to_cache_prepared();
        // The server parses the text as a name, which includes the quotes.
        out.push_sql("SELECT pg_catalog.has_any_column_privilege($name$");
        self.0.walk_ast(out.reborrow())?;
        out.push_sql("$name$, 'UPDATE')");
        Ok(())
    }
}

impl<T> Query for MayLock<T> {
    type SqlType = Bool;
}

impl<T> QueryId for MayLock<T> {
    type QueryId = ();
    const HAS_STATIC_QUERY_ID: bool = false;
}

impl<T, C> RunQueryDsl<C> for MayLock<T> {}

impl<T, DB> Query for UpdateMany<'_, T, DB> {
    type SqlType = Integer;
}

impl<T, DB> QueryId for UpdateMany<'_, T, DB> {
    type QueryId = ();
    const HAS_STATIC_QUERY_ID: bool = false;
}

impl<T, DB, C> RunQueryDsl<C> for UpdateMany<'_, T, DB> {}

impl<T, DB> fmt::Debug for UpdateMany<'_, T, DB> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UpdateMany").field("rows", &self.rows).finish_non_exhaustive()
    }
}
