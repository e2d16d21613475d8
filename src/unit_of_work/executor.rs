//! The way from the unit of work to the database: the session's, whose transaction it is.

use std::any::type_name;
use std::marker::PhantomData;
use std::rc::Weak;

use diesel::result::QueryResult;

use super::entity::Persist;
use super::tracked_row::Reader;
use crate::error::{Place, Result};

/// What is sent, as far as it matters to the connection.
#[derive(Debug, Clone, Copy)]
pub(crate) enum StatementKind {
    /// A SELECT of an entity's columns. The name tells entities apart.
    Select(&'static str),
    /// An INSERT that gives an entity's columns back.
    Insert(&'static str),
    /// An UPDATE or DELETE.
    Change,
}

impl StatementKind {
    pub(crate) fn select<T: 'static>() -> Self {
        Self::Select(type_name::<Selecting<T>>())
    }

    pub(crate) fn insert<T: 'static>() -> Self {
        Self::Insert(type_name::<Inserting<T>>())
    }
}

struct Selecting<T>(PhantomData<T>);
struct Inserting<T>(PhantomData<T>);

pub(crate) trait Executor<C> {
    fn send(&self, what: StatementKind, run: &mut dyn FnMut(&mut C) -> QueryResult<()>) -> Result<()>;

    /// Whether the database has `RETURNING`.
    fn returning(&self) -> bool;

    /// Whether the database looks at foreign keys at the end of a statement, not at each row.
    fn checks_at_end(&self) -> bool {
        self.returning()
    }

    fn at(&self) -> Place;
}

/// The session that a unit of work belongs to, for what a handle reads by itself.
pub(crate) trait Connected<C> {
    /// Whether a plain SELECT may find an older row than a locking one.
    fn has_snapshot(&self) -> bool;

    /// Sends a SELECT, without a flush before it.
    fn read(&self, what: StatementKind, at: Place, run: &mut dyn FnMut(&mut C) -> QueryResult<()>) -> Result<()>;
}

/// Reads rows of `T` for their handles.
pub(super) fn reader<C: 'static, T: Persist<C>>(session: &Weak<dyn Connected<C>>) -> Reader<T> {
    let session = Weak::clone(session);
    Box::new(move |id, locked, at| {
        let Some(session) = session.upgrade() else { return Ok(None) };
        let mut rows = Vec::new();
        session.read(StatementKind::select::<T>(), at, &mut |conn| {
            rows = if locked && session.has_snapshot() { T::find_newest(conn, id)? } else { T::find(conn, id)? };
            Ok(())
        })?;
        Ok(rows.pop())
    })
}

/// Sends one statement and gives its answer.
pub(crate) fn ask<C, R>(
    sender: &dyn Executor<C>,
    what: StatementKind,
    mut run: impl FnMut(&mut C) -> QueryResult<R>,
) -> Result<R> {
    let mut answer = None;
    sender.send(what, &mut |conn| {
        answer = Some(run(conn)?);
        Ok(())
    })?;
    Ok(answer.expect("sent without an error"))
}
