//! What derived code calls.

use std::cell::RefCell;

use diesel::result::{Error, QueryResult};

use super::super::entity::{Entity, Insert, Persist};
use super::super::key_comparison::find_by_keys;
use crate::connection::SessionConnection;

/// The rows that were inserted just now, for databases that do not give them back: by the keys that the program made, or by those
/// that InnoDB has counted, one after the other for one statement.
#[doc(hidden)]
pub fn read_back<C, N>(conn: &mut C, rows: &[&N]) -> QueryResult<Vec<N::Entity>>
where
    C: SessionConnection,
    N: Insert<C>,
{
    let made: Option<Vec<_>> = rows.iter().map(|row| row.key()).collect();
    let Some(ids) = made else { return read_auto_increment::<C, N>(conn, rows.len()) };
    let mut read = Vec::with_capacity(ids.len());
    for ids in ids.chunks(N::Entity::MAX_FIND_KEYS.max(1)) {
        let mut found = {
            let conn = RefCell::new(&mut *conn);
            find_by_keys(ids, &mut |ids| N::Entity::find_many(&mut **conn.borrow_mut(), ids), &mut |id| {
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
pub fn reset_last_insert_id<C: SessionConnection>(conn: &mut C) -> QueryResult<()> {
    conn.batch_execute("DO LAST_INSERT_ID(0)")
}

const COUNTED: &str = "SELECT CONCAT(LAST_INSERT_ID(), ' ', @@auto_increment_increment) AS value";

fn read_auto_increment<C, N>(conn: &mut C, rows: usize) -> QueryResult<Vec<N::Entity>>
where
    C: SessionConnection,
    N: Insert<C>,
{
    let answer = conn.texts(COUNTED)?.into_iter().next().flatten().unwrap_or_default();
    let numbers = answer.split_once(' ').and_then(|(first, step)| Some((first.parse().ok()?, step.parse().ok()?)));
    let (first, step): (u64, u64) = numbers.unwrap_or_default();
    if first == 0 || !N::Entity::is_auto_increment() {
        return Err(unreadable::<N::Entity>(
            "has a key that the database made and does not collect_changes: MySQL and MariaDB give back no more of it than an AUTO_INCREMENT, of one \
             column of the key. If a trigger or a sequence makes the key, make other keys in the program",
        ));
    }
    let numbers: Vec<u64> = (0..rows as u64).map(|row| first + row * step).collect();
    let mut read = Vec::with_capacity(rows);
    for numbers in numbers.chunks(N::Entity::MAX_FIND_KEYS.max(1)) {
        read.extend(N::Entity::find_auto_increment(conn, numbers)?);
    }
    match read.len() == rows {
        true => Ok(read),
        false => Err(unreadable::<N::Entity>(
            "is not the only one with the number that the database has read_auto_increment, or has another: a trigger may have changed it. Make the \
             key in the program",
        )),
    }
}

/// Most bytes of one statement on MySQL and MariaDB. The server closes the connection over a longer one.
#[doc(hidden)]
pub fn max_statement_bytes<C: SessionConnection>(conn: &mut C) -> QueryResult<Option<usize>> {
    let answer = conn.texts("SELECT CAST(@@max_allowed_packet AS CHAR) AS value")?;
    Ok(answer.into_iter().next().flatten().and_then(|bytes| bytes.parse().ok()))
}

fn unreadable<E: Entity>(why: &str) -> Error {
    Error::QueryBuilderError(format!("the new row of `{}` {why}", E::NAME).into())
}
