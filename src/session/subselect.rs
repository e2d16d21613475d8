//! Queries around a query of the program: how many rows it has, and no more than two of them.

use std::rc::Rc;

use diesel::backend::Backend;
use diesel::connection::LoadConnection;
use diesel::expression::QueryMetadata;
use diesel::query_builder::{AstPass, Query, QueryFragment, QueryId};
use diesel::query_dsl::methods::LoadQuery;
use diesel::result::Error;
use diesel::sql_types::BigInt;
use diesel::{QueryResult, RunQueryDsl};

use super::transaction_state::Access;
use crate::dialect;
use crate::kind::DatabaseKind;

/// `SELECT COUNT(*) FROM (query)`.
#[doc(hidden)]
#[derive(Debug)]
pub struct Counted<Q>(Rc<Q>);

/// `SELECT * FROM (query) LIMIT 2`.
#[doc(hidden)]
#[derive(Debug)]
pub struct AtMostTwo<Q>(Rc<Q>);

/// The query itself.
#[doc(hidden)]
#[derive(Debug)]
pub struct Same<Q>(Rc<Q>);

macro_rules! around {
    ($name:ident, $sql_type:ty, $before:literal, $behind:literal) => {
        impl<Q: Query> Query for $name<Q> {
            type SqlType = $sql_type;
        }

        impl<Q: QueryId> QueryId for $name<Q> {
            type QueryId = $name<Q::QueryId>;
            const HAS_STATIC_QUERY_ID: bool = Q::HAS_STATIC_QUERY_ID;
        }

        impl<Q: QueryFragment<DB>, DB: Backend> QueryFragment<DB> for $name<Q> {
            fn walk_ast<'b>(&'b self, mut out: AstPass<'_, 'b, DB>) -> QueryResult<()> {
                out.push_sql($before);
                self.0.walk_ast(out.reborrow())?;
                out.push_sql($behind);
                Ok(())
            }
        }

        impl<Q, C> RunQueryDsl<C> for $name<Q> {}
    };
}

around!(Counted, BigInt, "SELECT COUNT(*) FROM (", ") AS diesel_session_rows");
around!(AtMostTwo, Q::SqlType, "SELECT * FROM (", ") AS diesel_session_rows LIMIT 2");
around!(Same, Q::SqlType, "", "");

/// MySQL and MariaDB refuse a subselect with two columns of one name, as that of a join may be. The query by itself is none.
fn is_refused_subselect(kind: DatabaseKind, error: &Error) -> bool {
    kind == DatabaseKind::Mysql
        && matches!(error, Error::DatabaseError(..))
        && !kind.is_transient(error)
        && !dialect::is_connection_lost(error)
}

pub(super) fn count<'q, C, Q>(conn: &mut C, query: Q, kind: DatabaseKind) -> QueryResult<i64>
where
    C: LoadConnection<Backend: QueryMetadata<Q::SqlType>>,
    Q: Query + QueryFragment<C::Backend> + QueryId + 'q,
    Counted<Q>: LoadQuery<'q, C, i64>,
{
    let query = Rc::new(query);
    let counted =
        Counted(Rc::clone(&query)).internal_load(conn).and_then(|mut rows| rows.next().ok_or(Error::NotFound)?);
    match counted {
        Err(error) if is_refused_subselect(kind, &error) => {
            let mut rows = 0;
            for row in conn.load(Same(query))? {
                row?;
                rows += 1;
            }
            Ok(rows)
        }
        counted => counted,
    }
}

/// No more rows than two of a SELECT. Of what is none, or may be none, all rows.
pub(super) fn at_most_two<'q, C, U, Q>(
    conn: &mut C,
    query: Q,
    access: Access,
    kind: DatabaseKind,
) -> QueryResult<Vec<U>>
where
    AtMostTwo<Q>: LoadQuery<'q, C, U>,
    Same<Q>: LoadQuery<'q, C, U>,
{
    let query = Rc::new(query);
    if access == Access::Read {
        let rows = AtMostTwo(Rc::clone(&query)).internal_load(conn).and_then(Iterator::collect);
        if !matches!(&rows, Err(error) if is_refused_subselect(kind, error)) {
            return rows;
        }
    }
    Same(query).internal_load(conn)?.collect()
}
