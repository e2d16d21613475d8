//! The rows that a test finds in its database.

use std::borrow::Cow;
use std::fmt;

use crate::connection::SessionConnection;
use crate::error::Result;
use crate::session::Session;

/// Rows that exist when a test begins. SQL or a function inserts them.
///
/// If the tests have a template, a fixture runs once, into the template, and each test gets a copy.
/// [`TestIsolation`](super::TestIsolation) lists the cases with a template. The name of a fixture appears in error
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
    pub(super) rows: FixtureSource<C>,
}

/// The source of the rows.
pub(super) enum FixtureSource<C: SessionConnection> {
    Sql(Cow<'static, str>),
    Function(fn(&Session<C>) -> Result<()>),
}

impl<C: SessionConnection> Fixture<C> {
    /// A fixture of any number of SQL statements, which run in one transaction. `include_str!` reads the text from a
    /// file. A text without a statement does nothing.
    pub fn sql(name: impl Into<Cow<'static, str>>, text: impl Into<Cow<'static, str>>) -> Self {
        Self { name: name.into(), rows: FixtureSource::Sql(text.into()) }
    }

    /// A fixture that calls a function, in a separate context. The transaction is committed if the function returns
    /// `Ok`.
    pub fn function(name: impl Into<Cow<'static, str>>, run: fn(&Session<C>) -> Result<()>) -> Self {
        Self { name: name.into(), rows: FixtureSource::Function(run) }
    }
}

impl<C: SessionConnection> fmt::Debug for Fixture<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fixture").field("name", &self.name).finish_non_exhaustive()
    }
}
