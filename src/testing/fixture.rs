//! What a test's database holds beside its schema.

use std::borrow::Cow;
use std::fmt;

use crate::connection::SessionConnection;
use crate::error::Result;
use crate::session::Session;

/// Rows that are there when a test begins: SQL, or a function.
///
/// Where tests have a template it runs once and is copied ([`TestIsolation`](super::TestIsolation) says where); its name is for error
/// messages.
///
/// ```
/// use diesel::prelude::*;
/// use diesel_session::testing::Fixture;
/// use diesel_session::{Result, Session};
/// # diesel::table! { users (id) { id -> Integer, name -> Text, } }
///
/// fn two_users(session: &Session<SqliteConnection>) -> Result<()> {
///     session.execute(diesel::insert_into(users::table).values(vec![users::name.eq("Ada"), users::name.eq("Bob")]))?;
///     Ok(())
/// }
///
/// let from_code = Fixture::function("two users", two_users);
/// let from_sql = Fixture::<SqliteConnection>::sql("a user", "INSERT INTO users (name) VALUES ('Ada')");
/// ```
pub struct Fixture<C: SessionConnection> {
    pub(super) name: Cow<'static, str>,
    pub(super) rows: Rows<C>,
}

/// Where the rows come from.
pub(super) enum Rows<C: SessionConnection> {
    Sql(Cow<'static, str>),
    Function(fn(&Session<C>) -> Result<()>),
}

impl<C: SessionConnection> Fixture<C> {
    /// SQL, of any number of statements, which are one transaction; a file comes with `include_str!`. A text without a statement does
    /// nothing.
    pub fn sql(name: impl Into<Cow<'static, str>>, text: impl Into<Cow<'static, str>>) -> Self {
        Self { name: name.into(), rows: Rows::Sql(text.into()) }
    }

    /// A function, which runs in a context of its own; what it did is committed when it returns `Ok`.
    pub fn function(name: impl Into<Cow<'static, str>>, run: fn(&Session<C>) -> Result<()>) -> Self {
        Self { name: name.into(), rows: Rows::Function(run) }
    }
}

impl<C: SessionConnection> fmt::Debug for Fixture<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fixture").field("name", &self.name).finish_non_exhaustive()
    }
}
