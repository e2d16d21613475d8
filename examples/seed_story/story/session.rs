//! The suite with this crate.

use diesel::prelude::*;
use diesel_session::{App, Config, Database};

use super::entry::{MIGRATIONS, entries};
use super::suite::Suite;
use crate::Result;

pub(crate) static DB: Database<PgConnection> = Database::new(MIGRATIONS);

pub(crate) struct Sessions {
    url: String,
    /// The applications are kept until the end, as in the suites with r2d2.
    apps: Vec<App<PgConnection>>,
}

impl Sessions {
    pub(crate) fn new(url: &str) -> Self {
        Self { url: url.to_owned(), apps: Vec::new() }
    }
}

impl Suite for Sessions {
    fn test(&mut self, number: usize) -> Result<()> {
        let app = DB.init_app(format!("test-{number}"), Config::new(&self.url))?;
        app.create_all()?;
        app.run(|| {
            let session = DB.session()?;
            let ada = (entries::author.eq("Ada"), entries::message.eq("Hello"));
            session.execute(diesel::insert_into(entries::table).values(ada))?;
            let authors: Vec<String> = session.load(entries::table.select(entries::author))?;
            assert_eq!(authors, ["Ada"]);
            Ok(())
        })?;
        app.drop_all()?;
        app.dispose()?;
        self.apps.push(app);
        Ok(())
    }
}
