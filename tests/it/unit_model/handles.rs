//! Handles to rows of any of the tables.

use diesel::prelude::*;
use diesel_session::unit_of_work::RowState;
use diesel_session::{Result, Session, SessionConnection, Tracked};

use super::rows::{Column, Row, Table};
use super::tables::*;
use crate::per_database::AnyConnection;

#[derive(Debug, Clone, PartialEq)]
pub enum Handle {
    User(Tracked<User>),
    Post(Tracked<Post>),
    Comment(Tracked<Comment>),
    Badge(Tracked<Badge>),
    Node(Tracked<Node>),
    Link(Tracked<Link>),
    Counter(Tracked<Counter>),
}

/// Does the same with a handle of whatever type.
macro_rules! with_handle {
    ($handle:expr, $tracked:ident => $does:expr) => {
        match $handle {
            Handle::User($tracked) => $does,
            Handle::Post($tracked) => $does,
            Handle::Comment($tracked) => $does,
            Handle::Badge($tracked) => $does,
            Handle::Node($tracked) => $does,
            Handle::Link($tracked) => $does,
            Handle::Counter($tracked) => $does,
        }
    };
}
pub(crate) use with_handle;

/// Does the same with the entity, the table and the handle of whatever table.
macro_rules! with_table {
    ($which:expr, $entity:ident, $table:ident => $does:expr) => {
        with_table!(@ $which, $entity, $table, $does;
            User users, Post posts, Comment comments, Badge badges, Node nodes, Link links, Counter counters)
    };
    (@ $which:expr, $entity:ident, $table:ident, $does:expr; $($name:ident $module:ident),*) => {
        match $which {
            $(Table::$name => {
                type $entity = $crate::unit_model::tables::$name;
                use $crate::unit_model::tables::$module as $table;
                $does
            })*
        }
    };
}
pub(crate) use with_table;

macro_rules! from_tracked {
    ($($entity:ident)*) => {$(
        impl From<Tracked<$entity>> for Handle {
            fn from(tracked: Tracked<$entity>) -> Self {
                Self::$entity(tracked)
            }
        }
    )*};
}
from_tracked!(User Post Comment Badge Node Link Counter);

impl Handle {
    pub fn state(&self) -> RowState {
        with_handle!(self, tracked => tracked.state())
    }

    pub fn read(&self) -> Result<Row> {
        with_handle!(self, tracked => tracked.try_read().map(|row| row.row()))
    }

    pub fn id(&self) -> Result<i32> {
        with_handle!(self, tracked => tracked.try_read().map(|row| row.id))
    }

    /// Changes one column, from what it was.
    pub fn update(&self, column: Column, to: impl FnOnce(&Row) -> Option<i32>) -> Result<()> {
        with_handle!(self, tracked => {
            let mut row = tracked.try_write()?;
            let value = to(&row.row());
            row.set(column, value);
        });
        Ok(())
    }
}

/// Locking reads, on the connections that have them.
pub trait Locks: SessionConnection {
    const CAN_LOCK: bool = false;

    /// Reads a row and locks it.
    fn lock(session: &Session<Self>, table: Table, id: i32) -> Result<Vec<Handle>> {
        let _ = (session, table, id);
        Ok(Vec::new())
    }
}

macro_rules! locks {
    ($($connection:ty),*) => {$(
        impl Locks for $connection {
            const CAN_LOCK: bool = true;

            fn lock(session: &Session<Self>, which: Table, id: i32) -> Result<Vec<Handle>> {
                with_table!(which, T, table => {
                    let query = table::table.find(id).select(T::as_select()).for_update();
                    session.track::<T>(query).map(|rows| rows.into_iter().map(Handle::from).collect())
                })
            }
        }
    )*};
}
locks!(PgConnection, MysqlConnection);

impl Locks for SqliteConnection {}
impl Locks for AnyConnection {}
