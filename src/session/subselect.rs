//! Queries that wrap a query of the program: the number of its rows, and at most two of its rows.

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

/// The query without a wrapper.
#[doc(hidden)]
#[derive(Debug)]
pub struct Same<Q>(Rc<Q>);

macro_rules! wrapper {
    ($name:ident, $sql_type:ty, $before:literal, $after:literal) => {
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
                out.push_sql($after);
                Ok(())
            }
        }

        impl<Q, C> RunQueryDsl<C> for $name<Q> {}
    };
}

wrapper!(Counted, BigInt, "SELECT COUNT(*) FROM (", ") AS diesel_session_rows");
wrapper!(AtMostTwo, Q::SqlType, "SELECT * FROM (", ") AS diesel_session_rows LIMIT 2");
wrapper!(Same, Q::SqlType, "", "");

/// Whether MySQL or MariaDB may have refused a subselect with two columns of the same name, as a join has them. The
/// query alone is not a subselect.
fn may_be_refused_subselect(kind: DatabaseKind, error: &Error) -> bool {
    kind == DatabaseKind::Mysql
        && matches!(error, Error::DatabaseError(..))
        && !kind.is_transient(error)
        && !dialect::is_connection_lost(error)
}

/// The number of rows of the query. If the database refuses the subselect, the rows are loaded and counted.
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
        Err(error) if may_be_refused_subselect(kind, &error) => {
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

/// At most two rows of a SELECT; all rows of a statement that is not, or may not be, a SELECT.
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
        if !matches!(&rows, Err(error) if may_be_refused_subselect(kind, error)) {
            return rows;
        }
    }
    Same(query).internal_load(conn)?.collect()
}
