//! SQL that Diesel does not offer, composed of texts, names and Diesel's own parts.

use std::borrow::Cow;
use std::marker::PhantomData;

use diesel::RunQueryDsl;
use diesel::backend::Backend;
use diesel::expression::{AppearsOnTable, Expression, TypedExpressionType, ValidGrouping, is_aggregate};
use diesel::query_builder::{AstPass, Query, QueryFragment, QueryId};
use diesel::result::QueryResult;
use diesel::sql_types::Bool;

/// A statement that returns rows of the type `ST`, or a part of a statement of this type.
pub struct Sql<'a, DB, ST> {
    parts: Vec<Part<'a, DB>>,
    /// Whether Diesel keeps the prepared statement.
    is_cached: bool,
    sql_type: PhantomData<ST>,
}

enum Part<'a, DB> {
    Text(Cow<'static, str>),
    Name(Cow<'static, str>),
    Fragment(Box<dyn QueryFragment<DB> + 'a>),
}

impl<'a, DB: Backend, ST> Sql<'a, DB, ST> {
    pub(super) fn new() -> Self {
        Self { parts: Vec::new(), is_cached: true, sql_type: PhantomData }
    }

    /// SQL whose text depends on the number of rows, so that the prepared statement is not kept.
    pub(super) fn uncached() -> Self {
        Self { is_cached: false, ..Self::new() }
    }

    pub(super) fn text(mut self, text: impl Into<Cow<'static, str>>) -> Self {
        self.parts.push(Part::Text(text.into()));
        self
    }

    /// Adds a quoted name.
    pub(super) fn name(mut self, name: impl Into<Cow<'static, str>>) -> Self {
        self.parts.push(Part::Name(name.into()));
        self
    }

    pub(super) fn part(mut self, part: impl QueryFragment<DB> + 'a) -> Self {
        self.parts.push(Part::Fragment(Box::new(part)));
        self
    }
}

impl<DB: Backend, ST> QueryFragment<DB> for Sql<'_, DB, ST> {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, DB>) -> QueryResult<()> {
        if !self.is_cached {
            out.unsafe_to_cache_prepared();
        }
        for part in &self.parts {
            match part {
                Part::Text(text) => out.push_sql(text),
                Part::Name(name) => out.push_identifier(name)?,
                Part::Fragment(fragment) => fragment.walk_ast(out.reborrow())?,
            }
        }
        Ok(())
    }
}

impl<DB, ST> Query for Sql<'_, DB, ST> {
    type SqlType = ST;
}

impl<DB, ST: TypedExpressionType> Expression for Sql<'_, DB, ST> {
    type SqlType = ST;
}

impl<DB, ST> QueryId for Sql<'_, DB, ST> {
    type QueryId = ();
    const HAS_STATIC_QUERY_ID: bool = false;
}

impl<DB, ST> ValidGrouping<()> for Sql<'_, DB, ST> {
    type IsAggregate = is_aggregate::No;
}

impl<DB, ST: TypedExpressionType, Source> AppearsOnTable<Source> for Sql<'_, DB, ST> {}

impl<DB, ST, C> RunQueryDsl<C> for Sql<'_, DB, ST> {}

/// An INSERT with `RETURNING` for enums of connections. Their backend does not support `RETURNING` in Diesel.
pub fn returning<'a, DB, S>(
    insert: impl QueryFragment<DB> + 'a,
    selection: S,
) -> Sql<'a, DB, <S as Expression>::SqlType>
where
    DB: Backend,
    S: Expression + QueryFragment<DB> + 'a,
{
    Sql::new().part(insert).text(" RETURNING ").part(selection)
}

/// A SELECT with `FOR UPDATE` for enums of connections. Their backend supports no locking clause in Diesel.
pub fn for_update<'a, DB: Backend, S: Query + QueryFragment<DB> + 'a>(select: S) -> Sql<'a, DB, S::SqlType> {
    Sql::new().part(select).text(" FOR UPDATE")
}

/// A condition that holds if one of these conditions holds.
pub fn any_of<'a, DB: Backend, E: QueryFragment<DB> + 'a>(
    conditions: impl IntoIterator<Item = E>,
) -> Sql<'a, DB, Bool> {
    let separators = std::iter::once("(").chain(std::iter::repeat(" OR "));
    let add = |sql: Sql<'a, DB, Bool>, (separator, condition)| sql.text(separator).part(condition);
    std::iter::zip(separators, conditions).fold(Sql::new(), add).text(")")
}
