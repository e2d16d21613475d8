//! What derived code calls.

use std::collections::HashMap;

use diesel::RunQueryDsl;
use diesel::backend::Backend;
use diesel::expression::Expression;
use diesel::query_builder::{AstPass, Query, QueryFragment, QueryId};
use diesel::result::{Error, QueryResult};

use super::entity::{Entity, Insert, Persist};
use crate::connection::SessionConnection;

/// Most rows of one INSERT: beyond a thousand a longer statement gains nothing.
#[doc(hidden)]
pub const fn rows_of(columns: usize, binds: usize) -> usize {
    match binds.checked_div(columns) {
        Some(rows) if rows < 1000 => rows,
        _ => 1000,
    }
}

/// The rows that were inserted just now, where the database does not give them back: by the keys that the program made, or by those
/// that InnoDB has counted, one after the other for one statement.
#[doc(hidden)]
pub fn read_back<C, N>(conn: &mut C, rows: &[&N]) -> QueryResult<Vec<N::Entity>>
where
    C: SessionConnection,
    N: Insert<C>,
{
    let made: Option<Vec<_>> = rows.iter().map(|row| row.key()).collect();
    let ids = match made {
        Some(ids) => ids,
        None => counted::<C, N>(conn, rows.len())?,
    };
    let mut found = HashMap::with_capacity(ids.len());
    for ids in ids.chunks(N::Entity::FINDS.max(1)) {
        found.extend(N::Entity::find_many(conn, ids)?.into_iter().map(|row| (row.id(), row)));
    }
    let take =
        |id: &_| found.remove(id).ok_or_else(|| unreadable::<N::Entity>("is not there under the key it should have"));
    ids.iter().map(take).collect()
}

const COUNTED: &str = "SELECT CONCAT(LAST_INSERT_ID(), ' ', @@auto_increment_increment) AS value";

fn counted<C, N>(conn: &mut C, rows: usize) -> QueryResult<Vec<<N::Entity as Entity>::Id>>
where
    C: SessionConnection,
    N: Insert<C>,
{
    let answer = conn.texts(COUNTED)?.into_iter().next().flatten().unwrap_or_default();
    let numbers = answer.split_once(' ').and_then(|(first, step)| Some((first.parse().ok()?, step.parse().ok()?)));
    let (first, step): (u64, u64) = numbers.unwrap_or_default();
    if first == 0 || !N::Entity::COUNTED {
        return Err(unreadable::<N::Entity>("has a key that the database made and does not tell"));
    }
    let id = |row: usize| N::Entity::id_of_number(first + row as u64 * step);
    (0..rows).map(|row| id(row).ok_or_else(|| unreadable::<N::Entity>("has a key that its type cannot hold"))).collect()
}

fn unreadable<E: Entity>(why: &str) -> Error {
    let advice = "MySQL and MariaDB give back no more of it than an AUTO_INCREMENT; make other keys in the program";
    Error::QueryBuilderError(format!("the new row of `{}` {why}: {advice}", E::NAME).into())
}

/// An INSERT with `RETURNING`, for enums of connections, whose backend knows of none.
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

macro_rules! gates {
    ($dollar:tt $($feature:literal $name:ident),+) => { $(
        /// Its tokens, where the library is built with that backend.
        #[doc(hidden)]
        #[cfg(feature = $feature)]
        #[macro_export]
        macro_rules! $name {
            ($dollar($dollar tokens:tt)*) => { $dollar($dollar tokens)* };
        }

        /// Nothing, as the library is built without that backend.
        #[doc(hidden)]
        #[cfg(not(feature = $feature))]
        #[macro_export]
        macro_rules! $name {
            ($dollar($dollar tokens:tt)*) => {};
        }
    )+ };
}

gates!($ "postgres" __if_postgres, "mysql" __if_mysql, "sqlite" __if_sqlite);
