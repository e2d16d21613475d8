//! Reads inserted rows back on databases without `RETURNING`.

use diesel::result::{Error, QueryResult};

use super::super::entity::{Entity, Insert, Persist};
use super::super::key_comparison::find_by_keys;
use crate::connection::SessionConnection;

/// The rows that were inserted just now, for databases without `RETURNING`. They are read by the keys that the program
/// has made, or by the AUTO_INCREMENT numbers, which InnoDB assigns consecutively within one statement.
#[doc(hidden)]
pub fn read_back<C, N>(conn: &mut C, rows: &[&N]) -> QueryResult<Vec<N::Entity>>
where
    C: SessionConnection,
    N: Insert<C>,
{
    let program_made: Option<Vec<_>> = rows.iter().map(|row| row.key()).collect();
    let Some(ids) = program_made else { return read_auto_increment::<C, N>(conn, rows.len()) };
    let mut read = Vec::with_capacity(ids.len());
    for ids in ids.chunks(N::Entity::MAX_FIND_KEYS.max(1)) {
        let mut found = find_by_keys(ids, |ids| N::Entity::find_many(conn, ids))?;
        for (id, row) in ids.iter().zip(&mut found).filter(|(_, row)| row.is_none()) {
            *row = find_rounded::<C, N::Entity>(conn, id)?;
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

/// Finds the row of a key that the database has rounded, because the column stores fewer fractional digits of a second.
fn find_rounded<C, T: Persist<C>>(conn: &mut C, id: &T::Id) -> QueryResult<Option<T>> {
    for digits in (0..6).rev() {
        if let Some(row) = T::find_rounded(conn, id, digits)?.pop() {
            return Ok(Some(row));
        }
    }
    Ok(None)
}

/// Resets LAST_INSERT_ID of MySQL and MariaDB. An INSERT whose key comes from a sequence or a trigger does not set it,
/// and the old number would be that of another row.
#[doc(hidden)]
pub fn reset_last_insert_id<C: SessionConnection>(conn: &mut C) -> QueryResult<()> {
    conn.batch_execute("DO LAST_INSERT_ID(0)")
}

const LAST_INSERT_ID: &str = "SELECT CONCAT(LAST_INSERT_ID(), ' ', @@auto_increment_increment) AS value";

/// Reads the rows of the last INSERT by their AUTO_INCREMENT numbers.
fn read_auto_increment<C, N>(conn: &mut C, rows: usize) -> QueryResult<Vec<N::Entity>>
where
    C: SessionConnection,
    N: Insert<C>,
{
    let answer = conn.texts(LAST_INSERT_ID)?.into_iter().next().flatten().unwrap_or_default();
    let numbers = answer.split_once(' ').and_then(|(first, step)| Some((first.parse().ok()?, step.parse().ok()?)));
    let (first, step): (u64, u64) = numbers.unwrap_or_default();
    if first == 0 || !N::Entity::is_auto_increment() {
        return Err(unreadable::<N::Entity>(
            "has a key that the database made and does not tell: MySQL and MariaDB give back no more of it than an AUTO_INCREMENT, of one \
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
            "is not the only one with the number that the database has counted, or has another: a trigger may have changed it. Make the \
             key in the program",
        )),
    }
}

/// Maximum size of a statement on MySQL and MariaDB, in bytes. The server closes the connection after a longer
/// statement.
#[doc(hidden)]
pub fn max_statement_bytes<C: SessionConnection>(conn: &mut C) -> QueryResult<Option<usize>> {
    let answer = conn.texts("SELECT CAST(@@max_allowed_packet AS CHAR) AS value")?;
    Ok(answer.into_iter().next().flatten().and_then(|bytes| bytes.parse().ok()))
}

fn unreadable<E: Entity>(why: &str) -> Error {
    Error::QueryBuilderError(format!("the new row of `{}` {why}", E::NAME).into())
}
