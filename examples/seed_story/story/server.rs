//! The PostgreSQL server of the story, and its counts of the story's sessions.

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

/// If this variable is set, the story runs although other clients are connected.
const AMONG_OTHERS: &str = "SEED_STORY_AMONG_OTHERS";

const COUNT: &str =
    "SELECT count(*) AS number FROM pg_stat_activity WHERE application_name = $1 AND backend_type = 'client backend'";

pub(crate) struct Server {
    /// The URL for the applications of the story.
    pub(crate) url: String,
    /// The name of their sessions in `pg_stat_activity`.
    tag: String,
    pub(crate) slots: Slots,
    is_alone: bool,
    observer: Mutex<Observer>,
    /// The schema on the user's server. It is dropped after the observer's session has closed.
    _schema: Option<Schema>,
}

/// The observer's session. It was opened before the story began, so it works while all slots are taken.
enum Observer {
    ThrowAway(Box<Postgres>),
    Given(PgConnection),
}

#[derive(QueryableByName)]
struct Number {
    #[diesel(sql_type = BigInt)]
    number: i64,
}

impl Server {
    /// The server that `DATABASE_URL` names, or a throw-away server.
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
        Ok(Self {
            url,
            tag,
            slots,
            is_alone: true,
            observer: Mutex::new(Observer::ThrowAway(Box::new(server))),
            _schema: None,
        })
    }

    fn given(given: &str, tag: String) -> Result<Self> {
        // This opens no connection. The crate's errors describe an invalid URL and never show a password.
        DB.init_app(&tag, Config::new(given))?;
        DB.remove_app(&tag)?;
        if url::sets_options(given) {
            return Err("DATABASE_URL sets `options`, which the story needs for a search_path of its own".into());
        }
        let search_path = format!("-csearch_path={tag}");
        let url = url::with(given, &[("application_name", &tag), ("options", &search_path)]);
        DB.init_app(&tag, Config::new(&url))?.ping()?;
        DB.remove_app(&tag)?;
        let mut observer = PgConnection::establish(given)?;
        let slots = Slots::measure(&mut PgConnection::establish(&url)?, &tag)?;
        let is_alone = slots.others == 1;
        if !is_alone && env::var_os(AMONG_OTHERS).is_none() {
            return Err(format!(
                "other clients ({}) are connected to the server that DATABASE_URL names, and this story takes all its \
                 slots for some seconds.\nTake a server that nobody needs, or set {AMONG_OTHERS}=1",
                slots.others - 1
            )
            .into());
        }
        let schema = Schema::create(&mut observer, given, &tag)?;
        Ok(Self { url, tag, slots, is_alone, observer: Mutex::new(Observer::Given(observer)), _schema: Some(schema) })
    }

    /// The current number of sessions of the story.
    pub(crate) fn sessions(&self) -> Result<usize> {
        self.ask(COUNT, &self.tag)
    }

    /// The number of sessions that stay open: the lowest number within 100 ms, because the server lists a closed session for a
    /// few more milliseconds.
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

    /// The number of all sessions that were opened in the database, including the observer's. `None` before version 15, which does
    /// not reliably count a session that has ended, and if other clients are connected, because they would be counted too.
    pub(crate) fn sessions_ever(&self) -> Result<Option<usize>> {
        let version = "SELECT current_setting('server_version_num')::bigint AS number WHERE $1 IS NOT NULL";
        if !self.is_alone || self.ask(version, "")? < 150_000 {
            return Ok(None);
        }
        let sessions = "SELECT sessions AS number FROM pg_stat_database WHERE datname = $1";
        self.ask(sessions, &self.slots.database).map(Some)
    }

    /// Runs `body`, and returns its result and the maximum number of sessions that the server had meanwhile.
    pub(crate) fn most_during<T>(&self, body: impl FnOnce() -> T) -> (T, usize) {
        let (over, most) = (AtomicBool::new(false), AtomicUsize::new(0));
        let result = thread::scope(|scope| {
            let _end = EndOnDrop(&over);
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    // If this query fails, the queries of `body` fail too, and report the error.
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
        let row = match &mut *self.observer.lock().unwrap_or_else(PoisonError::into_inner) {
            Observer::ThrowAway(server) => server.try_ask(ask)?,
            Observer::Given(conn) => {
                ask(conn).map_err(|error| format!("the server does not answer any more: {error}"))?
            }
        };
        Ok(usize::try_from(row.number)?)
    }
}

/// Ends the sampling when dropped, also if the body panics.
struct EndOnDrop<'s>(&'s AtomicBool);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
