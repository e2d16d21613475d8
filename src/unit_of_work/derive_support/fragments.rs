//! SQL clauses that Diesel does not offer for an enum of connections.

use diesel::RunQueryDsl;
use diesel::backend::Backend;
use diesel::expression::Expression;
use diesel::query_builder::{AstPass, Query, QueryFragment, QueryId};
use diesel::result::QueryResult;

/// An INSERT with `RETURNING` for enums of connections. Their backend does not support `RETURNING` in Diesel.
#[doc(hidden)]
#[derive(Debug)]
pub struct Returning<I, S> {
    insert: I,
    selection: S,
}

impl<I, S> Returning<I, S> {
    pub fn new(insert: I, selection: S) -> Self {
        Self { insert, selection }
    }
}

impl<I, S: Expression> Query for Returning<I, S> {
    type SqlType = S::SqlType;
}

impl<I: QueryId, S: QueryId> QueryId for Returning<I, S> {
    type QueryId = Returning<I::QueryId, S::QueryId>;
    const HAS_STATIC_QUERY_ID: bool = I::HAS_STATIC_QUERY_ID && S::HAS_STATIC_QUERY_ID;
}

impl<I: QueryFragment<DB>, S: QueryFragment<DB>, DB: Backend> QueryFragment<DB> for Returning<I, S> {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, DB>) -> QueryResult<()> {
        self.insert.walk_ast(out.reborrow())?;
        out.push_sql(" RETURNING ");
        self.selection.walk_ast(out)
    }
}

impl<I, S, C> RunQueryDsl<C> for Returning<I, S> {}

/// A SELECT with `FOR UPDATE` for enums of connections. Their backend supports no locking clause in Diesel.
#[doc(hidden)]
#[derive(Debug)]
pub struct ForUpdate<S> {
    select: S,
}

impl<S> ForUpdate<S> {
    pub fn new(select: S) -> Self {
        Self { select }
    }
}

impl<S: Query> Query for ForUpdate<S> {
    type SqlType = S::SqlType;
}

impl<S: QueryId> QueryId for ForUpdate<S> {
    type QueryId = ForUpdate<S::QueryId>;
    const HAS_STATIC_QUERY_ID: bool = S::HAS_STATIC_QUERY_ID;
}

impl<S: QueryFragment<DB>, DB: Backend> QueryFragment<DB> for ForUpdate<S> {
    fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, DB>) -> QueryResult<()> {
        self.select.walk_ast(out.reborrow())?;
        out.push_sql(" FOR UPDATE");
        Ok(())
    }
}

impl<S, C> RunQueryDsl<C> for ForUpdate<S> {}
