//! One UPDATE of several rows, each with values of its own.

use std::fmt;
use std::iter::zip;

use diesel::RunQueryDsl;
use diesel::backend::Backend;
use diesel::expression::{AsExpression, TypedExpressionType};
use diesel::query_builder::{AstPass, Query, QueryFragment, QueryId};
use diesel::query_source::Column;
use diesel::result::QueryResult;
use diesel::sql_types::{Integer, SqlType};

/// Most rows of one such UPDATE, where a row has so many values. Beyond a few hundred a longer statement gains nothing.
#[doc(hidden)]
pub const fn updates_of(values: usize, binds: usize) -> usize {
    let rows = if values == 0 { 1 } else { binds / values };
    if rows > 500 { 500 } else { rows }
}

/// `UPDATE .. FROM (VALUES ..) RETURNING`, which gives back the numbers of the rows that were there, from 0.
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
        self.wheres.push(self.values(column, values));
    }

    /// The version that each row has so far.
    pub fn version<C, V>(&mut self, column: C, values: impl Iterator<Item = V>)
    where
        C: Column<SqlType: SqlType + TypedExpressionType> + QueryFragment<DB> + 'a,
        V: AsExpression<C::SqlType, Expression: QueryFragment<DB> + 'a>,
    {
        self.version = Some(self.values(column, values));
    }

    pub fn set<C, V>(&mut self, column: C, values: impl Iterator<Item = V>)
    where
        C: Column<SqlType: SqlType + TypedExpressionType> + QueryFragment<DB> + 'a,
        V: AsExpression<C::SqlType, Expression: QueryFragment<DB> + 'a>,
    {
        self.sets.push(self.values(column, values));
    }

    fn values<C, V>(&self, column: C, values: impl Iterator<Item = V>) -> Values<'a, DB>
    where
        C: Column<SqlType: SqlType + TypedExpressionType> + QueryFragment<DB> + 'a,
        V: AsExpression<C::SqlType, Expression: QueryFragment<DB> + 'a>,
    {
        let values: Vec<_> = values.map(AsExpression::as_expression).collect();
        debug_assert_eq!(values.len(), self.rows);
        Values { name: C::NAME, column: Box::new(column), values: Box::new(values) }
    }
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

/// The name of the list. Where a table has that name as well, PostgreSQL refuses the statement.
const ROWS: &str = "diesel_session_rows";

impl<T: QueryFragment<DB>, DB: Backend> QueryFragment<DB> for UpdateMany<'_, T, DB> {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, DB>) -> QueryResult<()> {
        // There are as many of these statements as there are numbers of rows and sets of columns.
        out.unsafe_to_cache_prepared();
        let conditions = || self.wheres.iter().chain(&self.version);
        let of_list = |out: &mut AstPass<'_, 'b, DB>, number: usize| {
            out.push_identifier(ROWS)?;
            out.push_sql(".");
            out.push_identifier(&format!("column{number}"))
        };
        out.push_sql("UPDATE ");
        self.table.walk_ast(out.reborrow())?;
        // The first column is the row's number, those of the conditions follow.
        let first_set = 2 + conditions().count();
        for (number, set) in self.sets.iter().enumerate() {
            out.push_sql(if number == 0 { " SET " } else { ", " });
            out.push_identifier(set.name)?;
            out.push_sql(" = ");
            of_list(&mut out, first_set + number)?;
        }
        if let Some(version) = &self.version {
            out.push_sql(", ");
            out.push_identifier(version.name)?;
            out.push_sql(" = ");
            version.column.walk_ast(out.reborrow())?;
            out.push_sql(" + 1");
        }
        out.push_sql(" FROM (VALUES ");
        for row in 0..self.rows {
            out.push_sql(if row == 0 { "(" } else { "), (" });
            out.push_sql(&row.to_string());
            for column in conditions().chain(&self.sets) {
                out.push_sql(", ");
                column.values.walk(row, out.reborrow())?;
            }
        }
        out.push_sql(")) AS ");
        out.push_identifier(ROWS)?;
        for (number, condition) in zip(2.., conditions()) {
            out.push_sql(if number == 2 { " WHERE " } else { " AND " });
            condition.column.walk_ast(out.reborrow())?;
            out.push_sql(" = ");
            of_list(&mut out, number)?;
        }
        out.push_sql(" RETURNING ");
        of_list(&mut out, 1)
    }
}

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
