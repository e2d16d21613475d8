//! The PostgreSQL of the story, and what it says about the sessions of the story.

use std::env;
use std::hash::{BuildHasher, RandomState};
use std::process;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use diesel::prelude::*;
use diesel::sql_query;
use diesel::sql_types::{BigInt, Text};
use diesel_session::Config;

use super::schema::Schema;
use super::session::DB;
use super::slots::Slots;
use super::support::{Postgres, wait};
use super::url;
use crate::Result;

/// Runs the story although other clients are on the server.
const AMONG_OTHERS: &str = "SEED_STORY_AMONG_OTHERS";

const COUNT: &str =
    "SELECT count(*) AS number FROM pg_stat_activity WHERE application_name = $1 AND backend_type = 'client backend'";

pub(crate) struct Server {
    /// For the applications of the story.
    pub(crate) url: String,
    /// The name of their sessions in `pg_stat_activity`.
    tag: String,
    pub(crate) slots: Slots,
    alone: bool,
    eye: Mutex<Eye>,
    /// On the user's server. It goes after the eye has closed.
    _schema: Option<Schema>,
}

/// A session that was there before the story began, and so works while the slots are taken.
enum Eye {
    ThrowAway(Box<Postgres>),
    Given(PgConnection),
}

#[derive(QueryableByName)]
struct Number {
    #[diesel(sql_type = BigInt)]
    number: i64,
}

impl Server {
    /// The one that `DATABASE_URL` names, or else a throw-away one.
    pub(crate) fn choose() -> Result<Self> {
        let tag = format!("seed_story_{:016x}", RandomState::new().hash_one(process::id()));
        match env::var("DATABASE_URL") {
            Ok(url) => Self::given(&url, tag),
            Err(env::VarError::NotPresent) => Self::throw_away(tag),
            Err(env::VarError::NotUnicode(_)) => Err("DATABASE_URL is not valid UTF-8".into()),
        }
    }

    fn throw_away(tag: String) -> Result<Self> {
        let server = Postgres::try_start().map_err(|error| {
            format!("{error}\n`scripts/setup` installs it; or DATABASE_URL names a server that is there")
        })?;
        let url = url::with(&server.url(), &[("application_name", &tag)]);
        let slots = Slots::measure(&mut PgConnection::establish(&url)?, &tag)?;
        Ok(Self { url, tag, slots, alone: true, eye: Mutex::new(Eye::ThrowAway(Box::new(server))), _schema: None })
    }

    fn given(given: &str, tag: String) -> Result<Self> {
        // This opens nothing. The crate says what is wrong with a URL or a server, and never shows a password.
        DB.init_app(&tag, Config::new(given))?;
        DB.remove_app(&tag)?;
        if url::sets_options(given) {
            return Err("DATABASE_URL sets `options`, which the story needs for a search_path of its own".into());
        }
        let search_path = format!("-csearch_path={tag}");
        let url = url::with(given, &[("application_name", &tag), ("options", &search_path)]);
        DB.init_app(&tag, Config::new(&url))?.ping()?;
        DB.remove_app(&tag)?;
        let mut eye = PgConnection::establish(given)?;
        let slots = Slots::measure(&mut PgConnection::establish(&url)?, &tag)?;
        let alone = slots.others == 1;
        if !alone && env::var_os(AMONG_OTHERS).is_none() {
            return Err(format!(
                "other clients ({}) are connected to the server that DATABASE_URL names, and this story takes all its \
                 slots for some seconds.\nTake a server that nobody needs, or set {AMONG_OTHERS}=1",
                slots.others - 1
            )
            .into());
        }
        let schema = Schema::create(&mut eye, given, &tag)?;
        Ok(Self { url, tag, slots, alone, eye: Mutex::new(Eye::Given(eye)), _schema: Some(schema) })
    }

    /// Sessions of the story at this moment.
    pub(crate) fn sessions(&self) -> Result<usize> {
        self.ask(COUNT, &self.tag)
    }

    /// Sessions of the story that stay: the lowest number within a tenth of a second, as a session that its client has closed is
    /// listed a few milliseconds more.
    pub(crate) fn sessions_that_stay(&self) -> Result<usize> {
        let mut lowest = self.sessions();
        wait::until(Duration::from_millis(100), || {
            let now = self.sessions();
            if matches!((&now, &lowest), (Ok(now), Ok(low)) if now < low) || now.is_err() {
                lowest = now;
            }
            !matches!(lowest, Ok(1..))
        });
        lowest
    }

    /// Waits until no session of the story is left.
    pub(crate) fn wait_until_empty(&self) -> Result<()> {
        match wait::until_equal(Some(0), Duration::from_secs(10), || self.sessions().ok()) {
            Some(0) => Ok(()),
            left => Err(format!("sessions of the story did not leave the server: {left:?}").into()),
        }
    }

    /// Sessions that were ever opened in the database, the observer's own included, where the server can tell: since version 15 a
    /// session is counted for certain when it has left, and strangers in the database would be counted too.
    pub(crate) fn sessions_ever(&self) -> Result<Option<usize>> {
        let version = "SELECT current_setting('server_version_num')::bigint AS number WHERE $1 IS NOT NULL";
        if !self.alone || self.ask(version, "")? < 150_000 {
            return Ok(None);
        }
        let sessions = "SELECT sessions AS number FROM pg_stat_database WHERE datname = $1";
        self.ask(sessions, &self.slots.database).map(Some)
    }

    /// Runs `body`; the most sessions of the story that the server was seen with meanwhile.
    pub(crate) fn most_during<T>(&self, body: impl FnOnce() -> T) -> (T, usize) {
        let (over, most) = (AtomicBool::new(false), AtomicUsize::new(0));
        let result = thread::scope(|scope| {
            let _over = Over(&over);
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    // Where this fails, the body's own questions do too, and their error is told.
                    most.fetch_max(self.sessions().unwrap_or_default(), Ordering::Relaxed);
                    thread::sleep(Duration::from_millis(2));
                }
            });
            body()
        });
        (result, most.into_inner())
    }

    fn ask(&self, query: &str, text: &str) -> Result<usize> {
        let ask = |conn: &mut PgConnection| sql_query(query).bind::<Text, _>(text).get_result::<Number>(conn);
        let row = match &mut *self.eye.lock().unwrap_or_else(PoisonError::into_inner) {
            Eye::ThrowAway(server) => server.try_ask(ask)?,
            Eye::Given(conn) => ask(conn).map_err(|error| format!("the server does not answer any more: {error}"))?,
        };
        Ok(usize::try_from(row.number)?)
    }
}

/// Ends the sampling, also when the body panics.
struct Over<'s>(&'s AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
