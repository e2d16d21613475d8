//! Databases in which tests run that are rolled back. Each has one connection at a time, and is as it was filled, so it is kept.

use std::sync::Arc;

use super::address::with_database;
use super::homes::{Home, Site, Started};
use super::house::Admission;
use super::names::Name;
use super::owner::Desk;
use super::slots::Taken;
use crate::app::App;
use crate::backend::Kind;
use crate::config::Config;
use crate::connection::SessionConnection;
use crate::error::{ConnectErrorKind, Error, Result};
use crate::pool::{Lane, TAKEN};

/// A lane's connection, between two tests or in one.
pub(super) struct FreeLane<C: SessionConnection> {
    // Before the slot: it is free when the connection is closed.
    lane: Arc<Lane<C>>,
    content: u64,
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
            free.iter().rposition(|lane| lane.content == content).map(|at| free.swap_remove(at))
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
            let lane = FreeLane { lane: Arc::new(Lane::new(None)), content, database: None, url, taken: None };
            self.enter(&lane).map(|app| (app, lane))
        });
        let emptied = filler.dispose();
        let (app, lane) = filled?;
        emptied?;
        Ok((app, Home::Lane(lane), admission))
    }

    fn start_on_server(&self, content: u64) -> Result<Started<C>> {
        let mut admission = self.house.admit(1, false, self.test(), self.deadline)?;
        // On this machine nobody else has the slot, and so the lane of that number.
        let first = admission.taken.as_ref().and_then(|taken| taken.numbers().next()).unwrap_or_default();
        let mut number = u32::try_from(first).unwrap_or_default();
        loop {
            let name = Name::Lane { content, number };
            let database = name.to_string();
            let url = with_database(&self.house.target, &database).map_err(|reason| self.failed(AT, reason))?;
            let lane = Arc::new(Lane::new(self.kind().claim_lane(&database)));
            let lane = FreeLane { lane, content, database: Some(database.clone()), url, taken: None };
            match self.enter(&lane) {
                Ok(app) if self.is_whole(&app)? => return Ok((app, Home::Lane(lane), admission)),
                Ok(app) => {
                    drop(app.dispose());
                    lane.lane.end(self.kind());
                    drop(lane);
                    self.make_lane(&mut admission, name, true)?;
                }
                Err(Error::Connect { kind: ConnectErrorKind::UnknownDatabase, .. }) => {
                    drop(lane);
                    self.make_lane(&mut admission, name, false)?;
                }
                Err(Error::Connect { message, .. }) if message.contains(TAKEN) => {
                    lane.lane.end(self.kind());
                    number += 1000;
                }
                Err(other) => return Err(other),
            }
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

    /// Whether a lane was filled to the end. PostgreSQL's get their name when they are; elsewhere the versions are the last that is written.
    fn is_whole(&self, app: &App<C>) -> Result<bool> {
        if self.kind() != Kind::Mysql {
            return Ok(true);
        }
        let mut versions = self.content.schema.script.versions().map(str::to_owned).collect::<Vec<_>>();
        versions.sort();
        let mut lease = app.pool()?.acquire(std::panic::Location::caller(), false, None)?;
        let applied = lease.conn().texts("SELECT version AS value FROM __diesel_schema_migrations ORDER BY version");
        let applied: Vec<String> = applied.unwrap_or_default().into_iter().flatten().collect();
        Ok(applied == versions && !versions.is_empty())
    }

    fn make_lane(&self, admission: &mut Admission<C>, name: Name, is_there: bool) -> Result<()> {
        let database = name.to_string();
        if admission.taken.as_ref().is_some_and(|taken| taken.len() < 2) {
            // One more for the owner's session, taken together: nobody waits with one of them in his hand.
            admission.taken = None;
            *admission = self.house.admit(1, true, self.test(), self.deadline)?;
        }
        match self.kind() {
            Kind::Mysql => self.make_mysql_lane(admission, &database, is_there),
            Kind::Postgres | Kind::Sqlite => self.make_kept(admission, name, false),
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
                desk.send(&kind.create_database(database, None))?;
                desk.prune(self.content.hash())?;
            }
            Ok(claimed)
        })?;
        if !claimed {
            return Ok(());
        }
        let filled = self.fill_database(database);
        self.house.work(admission, 1, |desk| {
            if filled.is_err() {
                desk.send(&kind.drop_database(database))?;
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

    /// Keeps it, with its slot, for the next test, unless one of this process waits for slots.
    pub(super) fn keep(mut self, site: &super::house::House<C>, taken: Option<Taken>) {
        self.taken = taken;
        let mut free = site.free();
        // Who waits for connections has cleared these or has been counted before: what is put there now it would not see.
        if site.somebody_waits() {
            drop(free);
            return;
        }
        free.push(self);
    }

    /// Removes its database, in which something was left.
    pub(super) fn remove(self, desk: &mut Desk<C>) -> Result<()> {
        let Some(database) = self.database.clone() else { return Ok(()) };
        drop(self);
        desk.is_empty_by(&database, std::time::Instant::now() + std::time::Duration::from_secs(1))?;
        desk.send(&desk.kind().drop_database(&database))
    }
}

/// What could not be done.
pub(super) const AT: &str = "finding its database";
