//! The suite with plain Diesel and r2d2.

use std::time::Duration;

use diesel::prelude::*;
use diesel::r2d2::{ConnectionManager, Pool};
use diesel_migrations::MigrationHarness;

use super::entry::{MIGRATIONS, entries};
use super::suite::Suite;
use crate::Result;

/// r2d2's `connection_timeout`. Its default is 30 s.
pub(crate) const PATIENCE: Duration = Duration::from_secs(2);

/// The application of a test.
struct App {
    pool: Pool<ConnectionManager<PgConnection>>,
}

pub(crate) struct Plain {
    url: String,
    max_size: Option<u32>,
    /// A test runner keeps its test objects until the end, and they keep their applications.
    apps: Vec<App>,
}

impl Plain {
    /// `None` is r2d2's default `max_size`.
    pub(crate) fn new(url: &str, max_size: Option<u32>) -> Self {
        Self { url: url.to_owned(), max_size, apps: Vec::new() }
    }

    fn new_app(&self) -> Result<App> {
        let builder = Pool::builder().connection_timeout(PATIENCE);
        let builder = if let Some(size) = self.max_size { builder.max_size(size) } else { builder };
        Ok(App { pool: builder.build(ConnectionManager::new(&self.url))? })
    }
}

impl Suite for Plain {
    fn test(&mut self, _number: usize) -> Result<()> {
        let app = self.new_app()?;
        {
            let mut conn = app.pool.get()?;
            conn.run_pending_migrations(MIGRATIONS)?;
            let ada = (entries::author.eq("Ada"), entries::message.eq("Hello"));
            diesel::insert_into(entries::table).values(ada).execute(&mut conn)?;
            let authors: Vec<String> = entries::table.select(entries::author).load(&mut conn)?;
            assert_eq!(authors, ["Ada"]);
            conn.revert_all_migrations(MIGRATIONS)?;
        }
        self.apps.push(app);
        Ok(())
    }
}
