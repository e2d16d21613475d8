//! What derived code calls.

use std::any::{TypeId, type_name};
use std::cell::RefCell;
use std::collections::HashMap;
use std::hash::Hash;

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

/// The rows of these keys, in their order. What a key is equal to is for the database to say, so a key whose row has another
/// spelling is asked for again, in halves, until it is known which row is its.
pub(super) fn by_key<Id, T, E>(
    ids: &[Id],
    many: &mut impl FnMut(&[Id]) -> Result<Vec<T>, E>,
    one: &mut impl FnMut(&Id) -> Result<Option<T>, E>,
) -> Result<Vec<Option<T>>, E>
where
    Id: Clone + Eq + Hash + 'static,
    T: Entity<Id = Id>,
{
    let mut rows: HashMap<Id, T> = many(ids)?.into_iter().map(|row| (row.id(), row)).collect();
    let mut found: Vec<Option<T>> = ids.iter().map(|id| rows.remove(id)).collect();
    let missing: Vec<usize> = (0..ids.len()).filter(|&place| found[place].is_none()).collect();
    if missing.is_empty() || is_exact::<Id>() {
        return Ok(found);
    }
    let mut left = vec![missing];
    while let Some(mut places) = left.pop() {
        if let [place] = places[..] {
            found[place] = one(&ids[place])?;
            continue;
        }
        let asked: Vec<Id> = places.iter().map(|&place| ids[place].clone()).collect();
        if !many(&asked)?.is_empty() {
            let half = places.split_off(places.len() / 2);
            left.extend([places, half]);
        }
    }
    Ok(found)
}

/// Whether databases compare keys of this type as Rust does.
pub(super) fn is_exact<Id: 'static>() -> bool {
    let exact = [
        TypeId::of::<i16>(),
        TypeId::of::<i32>(),
        TypeId::of::<i64>(),
        TypeId::of::<u8>(),
        TypeId::of::<u16>(),
        TypeId::of::<u32>(),
        TypeId::of::<u64>(),
    ];
    exact.contains(&TypeId::of::<Id>()) || type_name::<Id>() == "uuid::Uuid"
}

/// The rows that were inserted just now, for databases that do not give them back: by the keys that the program made, or by those
/// that InnoDB has counted, one after the other for one statement.
#[doc(hidden)]
pub fn read_back<C, N>(conn: &mut C, rows: &[&N]) -> QueryResult<Vec<N::Entity>>
where
    C: SessionConnection,
    N: Insert<C>,
{
    let made: Option<Vec<_>> = rows.iter().map(|row| row.key()).collect();
    let Some(ids) = made else { return counted::<C, N>(conn, rows.len()) };
    let mut read = Vec::with_capacity(ids.len());
    for ids in ids.chunks(N::Entity::FINDS.max(1)) {
        let mut found = {
            let conn = RefCell::new(&mut *conn);
            by_key(ids, &mut |ids| N::Entity::find_many(&mut **conn.borrow_mut(), ids), &mut |id| {
                Ok(N::Entity::find(&mut **conn.borrow_mut(), id)?.pop())
            })?
        };
        for (id, row) in ids.iter().zip(&mut found).filter(|(_, row)| row.is_none()) {
            *row = rounded::<C, N::Entity>(conn, id)?;
        }
        read.extend(found);
    }
    read.into_iter()
        .map(|row| {
            row.ok_or_else(|| {
                unreadable::<N::Entity>(
                    "is not there under the key that was sent: the database has changed the key, and MySQL and MariaDB do not give a new \
                     row back. Send keys as their column keeps them",
                )
            })
        })
        .collect()
}

/// The row of a key that was sent and is not there: a column that has fewer digits of a second has kept it with those.
fn rounded<C, T: Persist<C>>(conn: &mut C, id: &T::Id) -> QueryResult<Option<T>> {
    for digits in (0..6).rev() {
        if let Some(row) = T::find_rounded(conn, id, digits)?.pop() {
            return Ok(Some(row));
        }
    }
    Ok(None)
}

/// Makes MySQL and MariaDB forget the number that was counted last. An INSERT that is given a key by a sequence or a trigger counts none,
/// and the number would be that of another row.
#[doc(hidden)]
pub fn forget_counted<C: SessionConnection>(conn: &mut C) -> QueryResult<()> {
    conn.batch_execute("DO LAST_INSERT_ID(0)")
}

const COUNTED: &str = "SELECT CONCAT(LAST_INSERT_ID(), ' ', @@auto_increment_increment) AS value";

fn counted<C, N>(conn: &mut C, rows: usize) -> QueryResult<Vec<N::Entity>>
where
    C: SessionConnection,
    N: Insert<C>,
{
    let answer = conn.texts(COUNTED)?.into_iter().next().flatten().unwrap_or_default();
    let numbers = answer.split_once(' ').and_then(|(first, step)| Some((first.parse().ok()?, step.parse().ok()?)));
    let (first, step): (u64, u64) = numbers.unwrap_or_default();
    if first == 0 || !N::Entity::is_counted() {
        return Err(unreadable::<N::Entity>(
            "has a key that the database made and does not tell: MySQL and MariaDB give back no more of it than an AUTO_INCREMENT, of one \
             column of the key. If a trigger or a sequence makes the key, make other keys in the program",
        ));
    }
    let numbers: Vec<u64> = (0..rows as u64).map(|row| first + row * step).collect();
    let mut read = Vec::with_capacity(rows);
    for numbers in numbers.chunks(N::Entity::FINDS.max(1)) {
        read.extend(N::Entity::find_counted(conn, numbers)?);
    }
    match read.len() == rows {
        true => Ok(read),
        false => Err(unreadable::<N::Entity>(
            "is not the only one with the number that the database has counted, or has another: a trigger may have changed it. Make the \
             key in the program",
        )),
    }
}

/// Most bytes of one statement on MySQL and MariaDB. The server closes the connection over a longer one.
#[doc(hidden)]
pub fn most_bytes<C: SessionConnection>(conn: &mut C) -> QueryResult<Option<usize>> {
    let answer = conn.texts("SELECT CAST(@@max_allowed_packet AS CHAR) AS value")?;
    Ok(answer.into_iter().next().flatten().and_then(|bytes| bytes.parse().ok()))
}

fn unreadable<E: Entity>(why: &str) -> Error {
    Error::QueryBuilderError(format!("the new row of `{}` {why}", E::NAME).into())
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

/// A SELECT that locks its rows, for enums of connections, whose backend knows of no locking clause.
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
