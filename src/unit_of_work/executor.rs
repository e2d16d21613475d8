//! Executes the statements of the unit of work.

use std::any::type_name;
use std::marker::PhantomData;
use std::rc::Weak;

use diesel::result::QueryResult;

use super::entity::Persist;
use super::entity_state::RowReader;
use crate::error::{Result, SourceLocation};

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

/// Sends statements without a flush. The session implements this trait, because the transaction is its own.
pub(crate) trait Executor<C> {
    fn send(
        &self,
        kind: StatementKind,
        at: SourceLocation,
        run: &mut dyn FnMut(&mut C) -> QueryResult<()>,
    ) -> Result<()>;
}

/// Sends one statement and returns its result.
pub(super) fn execute<C, R>(
    session: &dyn Executor<C>,
    kind: StatementKind,
    at: SourceLocation,
    mut run: impl FnMut(&mut C) -> QueryResult<R>,
) -> Result<R> {
    let mut result = None;
    session.send(kind, at, &mut |conn| {
        result = Some(run(conn)?);
        Ok(())
    })?;
    Ok(result.expect("a statement that was sent without an error has a result"))
}

/// The reader of rows of `T` through this session, for handles that read an expired row.
pub(super) fn row_reader<C: 'static, T: Persist<C>>(session: &Weak<dyn Executor<C>>, is_mysql: bool) -> RowReader<T> {
    let session = Weak::clone(session);
    Box::new(move |id, locked, at| {
        let Some(session) = session.upgrade() else { return Ok(None) };
        let find = if locked && is_mysql { T::find_newest } else { T::find };
        Ok(execute(&*session, StatementKind::select::<T>(), at, |conn| find(conn, id))?.pop())
    })
}
