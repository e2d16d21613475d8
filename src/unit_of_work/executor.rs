//! Executes the statements of the unit of work. The session implements these traits, because the transaction is its
//! own.

use std::any::type_name;
use std::marker::PhantomData;
use std::rc::Weak;

use diesel::result::QueryResult;

use super::entity::Persist;
use super::entity_state::RowReader;
use crate::error::{Place, Result};

/// The kind of a statement, as far as the session has to know it.
#[derive(Debug, Clone, Copy)]
pub(crate) enum StatementKind {
    /// A SELECT of an entity's columns. The type name identifies the entity.
    Select(&'static str),
    /// An INSERT that returns an entity's columns.
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
    fn send(&self, kind: StatementKind, run: &mut dyn FnMut(&mut C) -> QueryResult<()>) -> Result<()>;

    /// Whether the database has `RETURNING`.
    fn has_returning(&self) -> bool;

    /// Whether the database checks foreign keys at the end of a statement, and not at each row.
    fn checks_foreign_keys_at_end(&self) -> bool {
        self.has_returning()
    }

    fn at(&self) -> Place;
}

/// Reads rows through the session of a unit of work, for handles that read an expired row.
pub(crate) trait SessionReader<C> {
    /// Whether a plain SELECT may return an older row than a locking SELECT.
    fn has_snapshot(&self) -> bool;

    /// Sends a SELECT without a flush.
    fn read(&self, kind: StatementKind, at: Place, run: &mut dyn FnMut(&mut C) -> QueryResult<()>) -> Result<()>;
}

/// The reader of rows of `T` through this session.
pub(super) fn row_reader<C: 'static, T: Persist<C>>(session: &Weak<dyn SessionReader<C>>) -> RowReader<T> {
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

/// Sends one statement and returns its result.
pub(crate) fn execute<C, R>(
    executor: &dyn Executor<C>,
    kind: StatementKind,
    mut run: impl FnMut(&mut C) -> QueryResult<R>,
) -> Result<R> {
    let mut result = None;
    executor.send(kind, &mut |conn| {
        result = Some(run(conn)?);
        Ok(())
    })?;
    Ok(result.expect("a statement that was sent without an error has a result"))
}
