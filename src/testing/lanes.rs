//! Databases in which tests run that are rolled back. Each has one connection at a time, and is as it was filled, so it is kept.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::address::with_database;
use super::homes::{Home, Site, Started};
use super::house::{Admission, House};
use super::names::Name;
use super::slots::Taken;
use crate::app::App;
use crate::backend::Kind;
use crate::config::Config;
use crate::connection::SessionConnection;
use crate::error::{ConnectErrorKind, Error, Result};
use crate::pool::{Lane, TAKEN};

/// How long the last sessions of a lane that is to be removed are waited for.
const LAST_SESSIONS: Duration = Duration::from_secs(1);

/// How long the owner's session is waited for, at the end of a test.
const LAST_OPEN: Duration = Duration::from_secs(5);

/// A table that a lane on MySQL or MariaDB has until it is filled: neither has a way to do that in one step, or to rename a database.
const UNFINISHED: &str = "__diesel_session_unfinished";

/// A lane's connection, between two tests or in one.
pub(super) struct FreeLane<C: SessionConnection> {
    // Before the slot: it is free when the connection is closed.
    lane: Arc<Lane<C>>,
    content: u64,
    /// How its connection was prepared: it stays so.
    settings: String,
    /// None for SQLite.
    database: Option<String>,
    url: String,
    taken: Option<Taken>,
}

impl<C: SessionConnection> Site<'_, C> {
    /// Begins a test in a lane: in one of this process's, or in a new one.
    pub(super) fn start_in_lane(&self) -> Result<Started<C>> {
        let content = self.content.hash();
        let free = {
            let mut free = self.house.free();
            let settings = self.settings();
            let fits = |lane: &FreeLane<C>| lane.content == content && lane.settings == settings;
            free.iter().rposition(fits).map(|at| free.swap_remove(at))
        };
        if let Some(mut lane) = free {
            let mut admission = self.house.admit_with(lane.taken.take());
            match self.enter(&lane) {
                Ok(app) => return Ok((app, Home::Lane(lane), admission)),
                // Whatever it was, such as a server that was started anew: it is looked for anew too.
                Err(error) => {
                    log::debug!(target: "diesel_session::testing", "a lane was not to be had again: {error}");
                    lane.taken = admission.taken.take();
                    drop(lane);
                }
            }
        }
        match self.kind() {
            Kind::Sqlite => self.start_in_memory(content),
            Kind::Postgres | Kind::Mysql => self.start_on_server(content),
        }
    }

    fn start_in_memory(&self, content: u64) -> Result<Started<C>> {
        let admission = self.house.admit(0, false, self.test(), self.deadline)?;
        let filler = self.filler(":memory:")?;
        let filled = self.content.fill(&filler).and_then(|()| {
            // It lives as long as somebody has it open.
            let url = filler.pool()?.url().to_owned();
            let (lane, settings) = (Arc::new(Lane::new(None)), self.settings());
            let lane = FreeLane { lane, content, settings, database: None, url, taken: None };
            self.enter(&lane).map(|app| (app, lane))
        });
        let emptied = filler.dispose();
        let (app, lane) = filled?;
        emptied?;
        Ok((app, Home::Lane(lane), admission))
    }

    fn start_on_server(&self, content: u64) -> Result<Started<C>> {
        let mut admission = self.house.admit(1, false, self.test(), self.deadline)?;
        // How many lanes of the slot's number somebody else is in.
        let mut taken = 0;
        loop {
            let number = lane_of(&admission);
            let name = Name::Lane { content, number: number + 1000 * taken };
            let database = name.to_string();
            let url = with_database(&self.house.target, &database).map_err(|reason| self.failed(AT, reason))?;
            let lane = Arc::new(Lane::new(self.kind().claim_lane(&database)));
            let settings = self.settings();
            let lane = FreeLane { lane, content, settings, database: Some(database.clone()), url, taken: None };
            let is_there = match self.enter(&lane) {
                Ok(app) if self.is_whole(&app)? => return Ok((app, Home::Lane(lane), admission)),
                Ok(app) => {
                    drop(app.dispose());
                    true
                }
                Err(Error::Connect { kind: ConnectErrorKind::UnknownDatabase, .. }) => false,
                Err(Error::Connect { message, .. }) if message.contains(TAKEN) => {
                    lane.lane.end(self.kind());
                    taken += 1;
                    continue;
                }
                Err(other) => return Err(other),
            };
            lane.lane.end(self.kind());
            drop(lane);
            if !self.house.has_owner() && admission.taken.as_ref().is_some_and(|taken| taken.len() < 2) {
                // One more for the owner's session, taken together: nobody waits with one of them in his hand.
                admission.retreat();
                admission = self.house.admit(1, true, self.test(), self.deadline)?;
                if lane_of(&admission) != number {
                    // Another slot is another lane, which may be there; whoever has the first slot now may make that one.
                    continue;
                }
            }
            self.make_lane(&mut admission, name, is_there)?;
        }
    }

    /// An application in the lane, which is inside of its transaction then.
    fn enter(&self, lane: &FreeLane<C>) -> Result<App<C>> {
        let config = Config {
            url: lane.url.clone(),
            max_size: 1,
            idle_timeout: None,
            max_lifetime: None,
            ..self.config.clone()
        };
        let app = self.house.registrar.make(self.id.to_string(), config, Some(Arc::clone(&lane.lane)))?;
        if let Err(error) = app.ping() {
            drop(app.dispose());
            return Err(error);
        }
        if let (Some(slots), Ok(pool)) = (&self.house.slots, app.pool())
            && pool.capacity() > 0
        {
            slots.set_capacity(pool.capacity());
        }
        Ok(app)
    }

    /// What a connection is told when it is new.
    fn settings(&self) -> String {
        let mut settings = self.kind().setup(&self.config, true);
        settings.extend(self.config.on_connect.iter().cloned());
        settings.extend(self.config.application_name.clone());
        settings.join("\0")
    }

    /// Whether a lane was filled to the end. PostgreSQL's get their name when they are; elsewhere there is a mark until then.
    fn is_whole(&self, app: &App<C>) -> Result<bool> {
        if self.kind() != Kind::Mysql {
            return Ok(true);
        }
        let mut versions = self.content.schema.script.versions().map(str::to_owned).collect::<Vec<_>>();
        versions.sort();
        let mut lease = app.pool()?.acquire(std::panic::Location::caller(), false, None)?;
        let mark = format!(
            "SELECT table_name AS value FROM information_schema.tables \
             WHERE table_schema = DATABASE() AND table_name = '{UNFINISHED}'"
        );
        let is_filled = lease.conn().texts(&mark).is_ok_and(|tables| tables.is_empty());
        let applied = lease.conn().texts("SELECT version AS value FROM __diesel_schema_migrations ORDER BY version");
        let applied: Vec<String> = applied.unwrap_or_default().into_iter().flatten().collect();
        Ok(is_filled && applied == versions)
    }

    fn make_lane(&self, admission: &mut Admission<C>, name: Name, is_there: bool) -> Result<()> {
        match self.kind() {
            Kind::Mysql => self.make_mysql_lane(admission, &name.to_string(), is_there),
            Kind::Postgres | Kind::Sqlite => {
                let others = self.house.known.lock().unwrap_or_else(PoisonError::into_inner).iter().copied().collect();
                self.make_kept(admission, name, false, others)
            }
        }
    }

    /// It has its last name from the beginning; who makes it has claimed it.
    fn make_mysql_lane(&self, admission: &mut Admission<C>, database: &str, is_there: bool) -> Result<()> {
        let kind = self.kind();
        let claim = kind.claim_lane(database).unwrap_or_default();
        let claimed = self.house.work(admission, 1, |desk| {
            let claimed = desk.is_true(&claim)?;
            if claimed {
                if is_there {
                    desk.send(&kind.drop_database(database))?;
                }
                self.create_database(desk, database, None)?;
                desk.send(&format!("CREATE TABLE {}.{UNFINISHED} (nothing INTEGER)", kind.quote(database)))?;
                desk.prune(&[self.content.hash()])?;
            }
            Ok(claimed)
        })?;
        if !claimed {
            return Ok(());
        }
        let filled = self.fill_database(database);
        self.house.work(admission, 1, |desk| {
            match &filled {
                Ok(()) => desk.send(&format!("DROP TABLE {}.{UNFINISHED}", kind.quote(database)))?,
                Err(_) => desk.send(&kind.drop_database(database))?,
            }
            desk.texts(&format!("SELECT CAST(RELEASE_LOCK({}) AS CHAR) AS value", kind.literal(database))).map(drop)
        })?;
        filled
    }
}

impl<C: SessionConnection> FreeLane<C> {
    /// Why nothing of the test can be undone, if so.
    pub(super) fn broken(&self) -> Option<(String, Option<crate::error::Place>)> {
        self.lane.broken().map(|broken| (broken.cause, broken.at))
    }

    /// Undoes the test. Whether the lane is as it was. One in memory is gone with its connection.
    pub(super) fn end(&self, kind: Kind) -> bool {
        self.lane.end(kind) && (kind != Kind::Sqlite || self.lane.is_connected())
    }

    /// Keeps it, with its slot, for the next test; where others wait for that, it is theirs.
    pub(super) fn keep(mut self, house: &House<C>, taken: Option<Taken>) {
        self.taken = taken;
        if !house.slots.as_ref().is_some_and(|slots| slots.is_wanted()) {
            house.free().push(self);
        }
    }

    /// Removes its database, in which something was left. The owner's session is opened for it where that is due, with this lane's slot. Who
    /// still has the connection loses it: the next test must not find what this one did.
    pub(super) fn remove(self, house: &House<C>, admission: &mut Admission<C>) -> Result<()> {
        let Some(database) = self.database.clone() else { return Ok(()) };
        drop(self);
        house.work_within(admission, 0, LAST_OPEN, |desk| {
            let kind = desk.kind();
            if !desk.is_empty_by(&database, Instant::now() + LAST_SESSIONS)? {
                for session in desk.texts(&kind.sessions_in(&database))? {
                    // It may have ended by itself.
                    let _ = desk.send(&kind.end_session(&session));
                }
                desk.is_empty_by(&database, Instant::now() + LAST_SESSIONS)?;
            }
            desk.send(&kind.drop_database(&database))
        })
    }
}

/// The number of the lane of a test: that of its first slot, which on this machine nobody else has.
fn lane_of<C: SessionConnection>(admission: &Admission<C>) -> u32 {
    let first = admission.taken.as_ref().and_then(|taken| taken.numbers().next());
    first.and_then(|first| u32::try_from(first).ok()).unwrap_or_default()
}

/// What could not be done.
pub(super) const AT: &str = "finding its database";
