//! One UPDATE of several rows, each with values of its own.

use std::fmt;
use std::iter::zip;

use diesel::RunQueryDsl;
use diesel::backend::Backend;
use diesel::expression::{AsExpression, TypedExpressionType};
use diesel::query_builder::{AstPass, Query, QueryFragment, QueryId};
use diesel::query_source::Column;
use diesel::result::QueryResult;
use diesel::sql_types::{Bool, Integer, SqlType};

/// Most rows of one such UPDATE, where a row has so many values. Beyond a few hundred a longer statement gains nothing.
#[doc(hidden)]
pub const fn max_update_rows(values: usize, binds: usize) -> usize {
    match binds.checked_div(values) {
        Some(rows) if rows < 500 => rows,
        _ => 500,
    }
}

/// `WITH rows AS (SELECT .. FOR NO KEY UPDATE) UPDATE .. FROM rows RETURNING`, which gives back the numbers of the rows that were
/// there, from 0.
///
/// The UPDATE alone would lock the rows in the order of its join, which differs from session to session, so that two sessions could
/// wait for each other whatever the order in which the program writes. The lock is the one that an UPDATE takes that leaves keys
/// as they are.
///
/// A number and not the key, as the database may have the key in other letters than the program: it is the database alone that compares
/// keys here. Values are bound as the types of their columns, which PostgreSQL is told, so that the list needs no casts.
#[doc(hidden)]
pub struct UpdateMany<'a, T, DB> {
    table: T,
    rows: usize,
    wheres: Vec<Values<'a, DB>>,
    sets: Vec<Values<'a, DB>>,
    version: Option<Values<'a, DB>>,
}

/// A column, and what it is to be in each row.
struct Values<'a, DB> {
    name: &'static str,
    /// With its table.
    column: Box<dyn QueryFragment<DB> + 'a>,
    values: Box<dyn Each<DB> + 'a>,
}

impl<'a, T, DB: Backend> UpdateMany<'a, T, DB> {
    pub fn new(table: T, rows: usize) -> Self {
        Self { table, rows, wheres: Vec::new(), sets: Vec::new(), version: None }
    }

    /// A part of the key.
    pub fn key<C, V>(&mut self, column: C, values: impl Iterator<Item = V>)
    where
        C: Column<SqlType: SqlType + TypedExpressionType> + QueryFragment<DB> + 'a,
        V: AsExpression<C::SqlType, Expression: QueryFragment<DB> + 'a>,
    {
        self.wheres.push(values_of(column, values));
    }

    /// The version that each row has so far.
    pub fn version<C, V>(&mut self, column: C, values: impl Iterator<Item = V>)
    where
        C: Column<SqlType: SqlType + TypedExpressionType> + QueryFragment<DB> + 'a,
        V: AsExpression<C::SqlType, Expression: QueryFragment<DB> + 'a>,
    {
        self.version = Some(values_of(column, values));
    }

    pub fn set<C, V>(&mut self, column: C, values: impl Iterator<Item = V>)
    where
        C: Column<SqlType: SqlType + TypedExpressionType> + QueryFragment<DB> + 'a,
        V: AsExpression<C::SqlType, Expression: QueryFragment<DB> + 'a>,
    {
        self.sets.push(values_of(column, values));
    }
}

fn values_of<'a, DB, C, V>(column: C, values: impl Iterator<Item = V>) -> Values<'a, DB>
where
    DB: Backend,
    C: Column<SqlType: SqlType + TypedExpressionType> + QueryFragment<DB> + 'a,
    V: AsExpression<C::SqlType, Expression: QueryFragment<DB> + 'a>,
{
    let values: Vec<_> = values.map(AsExpression::as_expression).collect();
    Values { name: C::NAME, column: Box::new(column), values: Box::new(values) }
}

/// The values of one column. The types of different columns differ, and the statement has them row by row.
trait Each<DB: Backend> {
    fn walk<'b>(&'b self, row: usize, out: AstPass<'_, 'b, DB>) -> QueryResult<()>;
}

impl<E: QueryFragment<DB>, DB: Backend> Each<DB> for Vec<E> {
    fn walk<'b>(&'b self, row: usize, out: AstPass<'_, 'b, DB>) -> QueryResult<()> {
        self[row].walk_ast(out)
    }
}

/// The name of the list. A table that has that name as well is refused by PostgreSQL.
const ROWS: &str = "diesel_session_rows";

/// The name of the list's values.
const VALUES: &str = "diesel_session_values";

fn of_list<DB: Backend>(out: &mut AstPass<'_, '_, DB>, list: &str, number: usize) -> QueryResult<()> {
    out.push_identifier(list)?;
    out.push_sql(".");
    out.push_identifier(&format!("column{number}"))
}

/// `FROM table, (VALUES ..) WHERE .. ORDER BY .. FOR ..`: locks the rows in the order of their keys. The first value of each is its
/// number, those of the conditions follow.
fn locked<'a: 'b, 'b, T: QueryFragment<DB>, DB: Backend>(
    table: &'b T,
    rows: usize,
    keys: &'b [Values<'a, DB>],
    version: Option<&'b Values<'a, DB>>,
    sets: &'b [Values<'a, DB>],
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
        of_list(out, VALUES, number)?;
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
        // There are as many of these statements as there are numbers of rows and sets of columns.
        out.unsafe_to_cache_prepared();
        let conditions = || self.wheres.iter().chain(&self.version);
        out.push_sql("WITH ");
        out.push_identifier(ROWS)?;
        out.push_sql(" AS (SELECT ");
        out.push_identifier(VALUES)?;
        out.push_sql(".*");
        locked(
            &self.table,
            self.rows,
            &self.wheres,
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
            of_list(&mut out, ROWS, first_set + number)?;
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
            of_list(&mut out, ROWS, number)?;
        }
        out.push_sql(" RETURNING ");
        of_list(&mut out, ROWS, 1)
    }
}

/// Locks rows in the order of their keys.
#[doc(hidden)]
pub struct LockRows<'a, T, DB> {
    table: T,
    rows: usize,
    keys: Vec<Values<'a, DB>>,
    clause: &'static str,
}

impl<'a, T, DB: Backend> LockRows<'a, T, DB> {
    pub fn new(table: T, rows: usize, for_delete: bool) -> Self {
        let clause = if for_delete { " FOR UPDATE" } else { " FOR NO KEY UPDATE" };
        Self { table, rows, keys: Vec::new(), clause }
    }

    /// A part of the key.
    pub fn key<C, V>(&mut self, column: C, values: impl Iterator<Item = V>)
    where
        C: Column<SqlType: SqlType + TypedExpressionType> + QueryFragment<DB> + 'a,
        V: AsExpression<C::SqlType, Expression: QueryFragment<DB> + 'a>,
    {
        self.keys.push(values_of(column, values));
    }
}

impl<T: QueryFragment<DB>, DB: Backend> QueryFragment<DB> for LockRows<'_, T, DB> {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, DB>) -> QueryResult<()> {
        out.unsafe_to_cache_prepared();
        out.push_sql("SELECT ");
        of_list(&mut out, VALUES, 1)?;
        locked(&self.table, self.rows, &self.keys, None, &[], self.clause, &mut out)
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

/// Whether the role may update a column of the table, without which it may not lock rows.
#[doc(hidden)]
#[derive(Debug)]
pub struct MayLock<T>(pub T);

impl<T: QueryFragment<DB>, DB: Backend> QueryFragment<DB> for MayLock<T> {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, DB>) -> QueryResult<()> {
        out.unsafe_to_cache_prepared();
        // The server reads the text as a name, quotes included.
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
