//! Commits whose answer is lost, and what can be learned of them.

use std::thread;
use std::time::{Duration, Instant};

use diesel::connection::SimpleConnection;
use diesel::prelude::*;
use diesel_session::unit_of_work::{Insert, Persist};
use diesel_session::{App, CommitOutcome, Config, Entity, Error, Fk, Result, Retry, RowState, Session, Tracked};

use crate::fixtures::{Any, COUNT, Conn, Guard, INSERT, Site, Speak};
use crate::on_every_server;
use crate::support::proxy::{Mode, Moment, Proxy};
use crate::support::{Kind, enabled};

on_every_server!(
    both_moments,
    a_part_of_several_commits,
    retried_when_told_only,
    rows_are_undecided_until_the_commit_is_resolved,
    handles_that_outlive_their_scope_are_decided_too,
    keys_of_undecided_rows_can_be_used
);

const MOMENTS: [(Moment, CommitOutcome, i64); 2] =
    [(Moment::BeforeForwarding, CommitOutcome::RolledBack, 0), (Moment::BeforeAnswer, CommitOutcome::Committed, 1)];

fn losing_commits(moment: Moment) -> Mode {
    Mode::CutOn(b"COMMIT".to_vec(), moment)
}

fn through<C: Conn>(proxy: &Proxy, site: &Site) -> Guard<C> {
    let app = C::app(Config::new(site.url_at(proxy.port())));
    app.create_all().unwrap();
    app
}

fn proxy_of(site: &Site) -> Proxy {
    Proxy::to(("127.0.0.1", site.port()))
}

type Way<C> = fn(&App<C>) -> Result<()>;

/// The ways to a commit, each inserting a row.
fn ways<C: Conn>() -> [Way<C>; 4] {
    [
        |app| app.scope().resolvable().commit_on_ok().run(|| C::db().session()?.send(INSERT)),
        |app| {
            app.scope()
                .commit_on_ok()
                .resolvable()
                .run(|| C::db().session()?.transaction(|session| session.send(INSERT)))
        },
        |app| app.scope().autocommit().resolvable().run(|| C::db().session()?.retry(3, |session| session.send(INSERT))),
        |app| {
            app.scope().resolvable().run(|| {
                let session = C::db().session()?;
                session.savepoint(|session| session.send(INSERT))?;
                session.commit()
            })
        },
    ]
}

fn both_moments<C: Conn>(site: &Site) {
    let proxy = proxy_of(site);
    let app = through::<C>(&proxy, site);
    let resolves = matches!(site, Site::Postgres(_));
    for (moment, outcome, rows) in MOMENTS {
        for insert in ways::<C>() {
            proxy.set(losing_commits(moment));
            let error = insert(&app).unwrap_err();
            assert!(matches!(&error, Error::CommitUnknown { .. }) && error.code() == "DS303", "{error}");
            let Error::CommitUnknown(unknown) = &error else { unreachable!() };
            assert_eq!(unknown.app, app.id());
            assert!(unknown.at.file().ends_with("commit_unknown.rs") && error.diesel().is_some());
            assert!(std::error::Error::source(&error).is_some_and(|source| source.is::<diesel::result::Error>()));
            assert_eq!(error.to_string().contains("`resolve()` asks"), resolves, "{error}");
            proxy.set(Mode::Pass);
            let resolved = (unknown.resolve().unwrap(), error.resolve().unwrap());
            if resolves {
                assert_eq!(resolved, (outcome.clone(), outcome.clone()), "{moment:?}");
            } else {
                let silent =
                    |outcome| matches!(outcome, CommitOutcome::Unknown { reason } if reason.contains("MariaDB"));
                assert!(silent(resolved.0) && silent(resolved.1), "{moment:?}");
            }
            let session = app.open_session().unwrap();
            assert_eq!(session.number(COUNT).unwrap(), rows, "{moment:?}: the answer is true");
            session.send("DELETE FROM entries").unwrap();
            session.commit().unwrap();
        }
        // The number costs a round trip, so nobody asks for it unbidden.
        proxy.set(losing_commits(moment));
        let error = app.scope().commit_on_ok().run(|| C::db().session()?.send(INSERT)).unwrap_err();
        proxy.set(Mode::Pass);
        let CommitOutcome::Unknown { reason } = error.resolve().unwrap() else { panic!("{error}") };
        assert!(reason.contains(if resolves { "resolvable()" } else { "MariaDB" }), "{reason}");
        app.scope().commit_on_ok().run(|| C::db().session()?.send("DELETE FROM entries")).unwrap();
    }
    assert_eq!(app.status().in_use, 0);
}

#[test]
fn both_moments_of_an_enum_on_postgres() {
    if enabled(Kind::Postgres) {
        both_moments::<Any>(&Site::postgres());
    }
}

/// The first database has committed when the second one's answer is lost.
fn a_part_of_several_commits<C: Conn>(site: &Site) {
    let proxy = proxy_of(site);
    let second = through::<C>(&proxy, site);
    let other = C::new_db();
    let first = other.init_app(second.id(), site.config()).unwrap();
    for (moment, outcome, rows) in MOMENTS {
        proxy.set(losing_commits(moment));
        let error = second.scope().resolvable().commit_on_ok().run(|| {
            other.session()?.send(INSERT)?;
            C::db().session()?.send(INSERT)
        });
        proxy.set(Mode::Pass);
        let error = error.unwrap_err();
        assert!(matches!(&error, Error::PartialCommit { source, .. } if source.is_commit_unknown()), "{error}");
        match error.resolve().unwrap() {
            CommitOutcome::Unknown { reason } => assert!(reason.contains("MariaDB"), "{reason}"),
            resolved => assert_eq!(resolved, outcome),
        }
        let session = first.open_session().unwrap();
        assert_eq!(session.number(COUNT).unwrap(), 1 + rows);
        session.send("DELETE FROM entries").unwrap();
        session.commit().unwrap();
    }
    other.remove_app(second.id()).unwrap();
}

fn retried_when_told_only<C: Conn>(site: &Site) {
    let proxy = proxy_of(site);
    let app = through::<C>(&proxy, site);
    for (even, moment, runs_wanted, rows) in [
        (false, Moment::BeforeForwarding, 1, 0),
        (false, Moment::BeforeAnswer, 1, 1),
        (true, Moment::BeforeForwarding, 2, 1),
        (true, Moment::BeforeAnswer, 2, 2),
    ] {
        let retry = if even { Retry::attempts(3).even_if_commit_unknown() } else { Retry::attempts(3) };
        let mut runs = 0;
        let done = app.context(|| {
            C::db().session()?.retry(retry, |session| {
                runs += 1;
                proxy.set(if runs == 1 { losing_commits(moment) } else { Mode::Pass });
                session.send(INSERT)
            })
        });
        proxy.set(Mode::Pass);
        assert_eq!(done.as_ref().is_err_and(Error::is_commit_unknown), !even, "{done:?}");
        let session = app.open_session().unwrap();
        assert_eq!((runs, session.number(COUNT).unwrap()), (runs_wanted, rows), "{moment:?}");
        session.send("DELETE FROM entries").unwrap();
        session.commit().unwrap();
    }
}

/// There was nothing that could have been committed.
#[test]
fn a_transaction_that_wrote_nothing_is_none_that_was_committed() {
    if !enabled(Kind::Postgres) {
        return;
    }
    let site = Site::postgres();
    let proxy = proxy_of(&site);
    let app = through::<PgConnection>(&proxy, &site);
    proxy.set(losing_commits(Moment::BeforeAnswer));
    let read = || PgConnection::db().session()?.number(COUNT);
    let error = app.scope().resolvable().commit_on_ok().run(read).unwrap_err();
    assert!(error.is_commit_unknown() && error.to_string().contains("nothing had been written"), "{error}");
    // Nobody has to be asked, and nobody could be.
    proxy.set(Mode::Refuse);
    assert_eq!(error.resolve().unwrap(), CommitOutcome::RolledBack);
}

/// What makes a commit wait for whoever has the advisory lock 7.
const WAIT_AT_COMMIT: &str = "
    CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN PERFORM pg_advisory_xact_lock(7); RETURN NULL; END $$;
    CREATE CONSTRAINT TRIGGER waits AFTER INSERT ON entries DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION wait()";

/// The server is still at it, and has not noticed that its client has gone.
#[test]
fn a_transaction_in_progress_is_asked_for_again_until_the_patience_ends() {
    if !enabled(Kind::Postgres) {
        return;
    }
    const PATIENCE: Duration = Duration::from_secs(1);
    let site = Site::postgres();
    let proxy = proxy_of(&site);
    let app = PgConnection::app(Config::new(site.url_at(proxy.port())).acquire_timeout(PATIENCE));
    app.create_all().unwrap();
    let mut blocker = PgConnection::establish(&site.url()).unwrap();
    blocker.batch_execute(WAIT_AT_COMMIT).unwrap();
    blocker.batch_execute("SELECT pg_advisory_lock(7)").unwrap();
    let error = thread::scope(|threads| {
        threads.spawn(|| {
            let waiting = "SELECT count(*) AS number FROM pg_locks WHERE locktype = 'advisory' AND NOT granted";
            while blocker.number(waiting).unwrap() == 0 {}
            proxy.cut_all();
        });
        let insert = || PgConnection::db().session()?.send(INSERT);
        app.scope().resolvable().commit_on_ok().run(insert).unwrap_err()
    });
    assert!(error.is_commit_unknown(), "{error}");

    let started = Instant::now();
    let CommitOutcome::Unknown { reason } = error.resolve().unwrap() else { panic!("it has not ended") };
    let waited = started.elapsed();
    assert!(reason.contains("in progress"), "{reason}");
    assert!(waited > PATIENCE / 2 && waited < PATIENCE + Duration::from_millis(500), "{waited:?}");

    let outcome = thread::scope(|threads| {
        threads.spawn(|| {
            thread::sleep(PATIENCE / 10);
            blocker.batch_execute("SELECT pg_advisory_unlock(7)").unwrap();
        });
        error.resolve().unwrap()
    });
    assert_eq!(outcome, CommitOutcome::Committed);
    assert_eq!(app.open_session().unwrap().number(COUNT).unwrap(), 1);
}

/// Who cannot be asked is an error, and may be asked again.
#[test]
fn asking_needs_a_connection() {
    if !enabled(Kind::Postgres) {
        return;
    }
    let site = Site::postgres();
    let proxy = proxy_of(&site);
    let app = through::<PgConnection>(&proxy, &site);
    proxy.set(losing_commits(Moment::BeforeAnswer));
    let insert = || PgConnection::db().session()?.send(INSERT);
    let error = app.scope().resolvable().commit_on_ok().run(insert).unwrap_err();
    proxy.set(Mode::HangUp);
    let refused = error.resolve().unwrap_err();
    assert!(matches!(&refused, Error::Connect { .. }), "{refused}");
    proxy.set(Mode::Pass);
    app.dispose().unwrap();
    assert_eq!(error.resolve().unwrap(), CommitOutcome::Committed, "a fresh pool is made for it");
    PgConnection::db().remove_app(app.id()).unwrap();
    assert!(error.resolve().unwrap_err().is_disposed());
}

/// `resolve` answers for every error.
#[test]
fn other_errors_are_not_about_a_commit() {
    let other = Error::from(diesel::result::Error::NotFound);
    let CommitOutcome::Unknown { reason } = other.resolve().unwrap() else { panic!("it knows nothing") };
    assert!(reason.contains("DS301"), "{reason}");
    let committed = |committed| Error::HookFailed { hook: "after_commit", committed, message: String::new() };
    assert_eq!(committed(true).resolve().unwrap(), CommitOutcome::Committed);
    assert!(matches!(committed(false).resolve().unwrap(), CommitOutcome::Unknown { .. }));
}

diesel::table! {
    entries (id) { id -> Integer, author -> Text, message -> Text, }
}

#[derive(Debug, Clone, Queryable, Selectable, Entity)]
#[diesel(table_name = entries)]
#[entity(new = NewEntry, connection = Any)]
struct Entry {
    #[entity(generated)]
    id: i32,
    author: String,
    message: String,
}

fn entry(message: &str) -> NewEntry {
    NewEntry { author: "Ada".into(), message: message.into() }
}

/// A row that a transaction inserts, one that it updates and one that it deletes, with the key of the first.
struct Rows {
    new: Tracked<Entry>,
    key: Fk<Entry>,
    changed: Tracked<Entry>,
    deleted: Tracked<Entry>,
}

impl Rows {
    fn states(&self) -> [RowState; 3] {
        [self.new.state(), self.changed.state(), self.deleted.state()]
    }

    /// Changes that are not committed.
    fn change<C: Conn>(session: &Session<C>) -> Result<Self>
    where
        NewEntry: Insert<C>,
        Entry: Persist<C>,
    {
        let (changed, deleted) = (session.add(entry("before")), session.add(entry("deleted")));
        session.flush()?;
        session.commit()?;
        let (changed, deleted) = (session.find::<Entry>(changed.read().id)?, session.find::<Entry>(deleted.read().id)?);
        let new = session.add(entry("new"));
        let key = new.key();
        changed.write().message = "after".into();
        session.delete(&deleted)?;
        Ok(Self { new, key, changed, deleted })
    }

    fn assert_undecided(&self) {
        assert_eq!(self.states(), [RowState::Undecided; 3]);
        assert_eq!(self.key.id(), Some(&self.new.read().id));
        assert_eq!(self.new.key().id(), self.key.id());
        assert_eq!((self.changed.read().message.as_str(), self.deleted.read().message.as_str()), ("after", "deleted"));
        let refused = self.changed.try_write().expect_err("it cannot be written to");
        assert!(matches!(&refused, Error::WrongState { state: RowState::Undecided, .. }), "{refused}");
        assert!(refused.to_string().contains("`resolve()`"), "{refused}");
        assert!(!self.new.is_dirty() && !self.changed.is_dirty());
    }

    fn assert_decided(&self, outcome: &CommitOutcome, wanted: [RowState; 3]) {
        assert_eq!(self.states(), wanted, "{outcome:?}");
        match outcome {
            CommitOutcome::Committed => {
                assert_eq!(self.key.id(), Some(&self.new.read().id));
                assert_eq!((self.new.read().message.as_str(), self.changed.read().message.as_str()), ("new", "after"));
            }
            _ => {
                assert!(self.key.id().is_none() && self.new.key().id().is_none() && self.new.try_read().is_err());
                assert!(self.changed.try_read().is_err());
            }
        }
    }
}

const DECIDED: [(CommitOutcome, [RowState; 3]); 2] = [
    (CommitOutcome::RolledBack, [RowState::Discarded, RowState::RolledBack, RowState::Expired]),
    (CommitOutcome::Committed, [RowState::Expired, RowState::Expired, RowState::Deleted]),
];

/// What the server has, to a client that the crate knows nothing of.
fn stored(site: &Site) -> Vec<String> {
    let query = entries::table.order(entries::id).select(entries::message);
    match site {
        Site::Postgres(_) => query.load(&mut PgConnection::establish(&site.url()).unwrap()),
        _ => query.load(&mut MysqlConnection::establish(&site.url()).unwrap()),
    }
    .unwrap()
}

fn rows_are_undecided_until_the_commit_is_resolved<C: Conn>(site: &Site)
where
    NewEntry: Insert<C>,
    Entry: Persist<C>,
{
    let proxy = proxy_of(site);
    let app = through::<C>(&proxy, site);
    let resolves = matches!(site, Site::Postgres(_));
    for autocommit in [false, true] {
        for ((moment, _, _), (outcome, wanted)) in MOMENTS.into_iter().zip(DECIDED) {
            let scope = if autocommit { app.scope().autocommit() } else { app.scope() };
            let rows = scope.resolvable().run(|| {
                let session = C::db().session()?;
                session.send("DELETE FROM entries")?;
                let rows = Rows::change(&session)?;
                proxy.set(losing_commits(moment));
                // In an autocommit scope the flush is a transaction of its own.
                let error = if autocommit { session.flush() } else { session.commit() }.unwrap_err();
                proxy.set(Mode::Pass);
                assert!(error.is_commit_unknown(), "{error}");
                rows.assert_undecided();
                assert!(!session.is_dirty());
                if resolves {
                    assert_eq!(error.resolve()?, outcome);
                    rows.assert_decided(&outcome, wanted);
                } else {
                    assert!(matches!(error.resolve()?, CommitOutcome::Unknown { .. }));
                    rows.assert_undecided();
                }
                // Whatever is known: what is read is what the server has.
                let committed = outcome == CommitOutcome::Committed;
                let changed = session.find::<Entry>(rows.changed.key().id().copied().unwrap())?;
                assert_eq!(changed, rows.changed);
                assert_eq!(changed.read().message, if committed { "after" } else { "before" });
                let again = session.get::<Entry>(rows.deleted.read().id)?;
                assert_eq!(again.as_ref(), (!committed).then_some(&rows.deleted));
                changed.write().message = "last".into();
                if let Some(deleted) = again {
                    session.delete(&deleted)?;
                }
                if !resolves {
                    let new = session.get::<Entry>(*rows.key.id().unwrap())?;
                    assert_eq!(new.as_ref(), committed.then_some(&rows.new));
                }
                session.commit()?;
                Ok::<_, Error>(rows)
            });
            let rows = rows.unwrap();
            let committed = outcome == CommitOutcome::Committed;
            assert_eq!(rows.deleted.state(), RowState::Deleted);
            assert_eq!(rows.new.state() == RowState::Detached, committed, "{:?}", rows.new);
            let wanted: &[&str] = if committed { &["last", "new"] } else { &["last"] };
            assert_eq!(stored(site), wanted);
        }
    }
}

/// The caller of a scope gets the error when the session is gone.
fn handles_that_outlive_their_scope_are_decided_too<C: Conn>(site: &Site)
where
    NewEntry: Insert<C>,
    Entry: Persist<C>,
{
    let proxy = proxy_of(site);
    let app = through::<C>(&proxy, site);
    let resolves = matches!(site, Site::Postgres(_));
    for ((moment, _, _), (outcome, _)) in MOMENTS.into_iter().zip(DECIDED) {
        let mut kept = None;
        let error = app.scope().resolvable().commit_on_ok().run(|| {
            kept = Some(Rows::change(&C::db().session()?)?);
            proxy.set(losing_commits(moment));
            Ok::<_, Error>(())
        });
        proxy.set(Mode::Pass);
        let (error, rows) = (error.unwrap_err(), kept.unwrap());
        rows.assert_undecided();
        if !resolves {
            assert!(matches!(error.resolve().unwrap(), CommitOutcome::Unknown { .. }));
            rows.assert_undecided();
            continue;
        }
        assert_eq!(error.resolve().unwrap(), outcome);
        let wanted = match outcome {
            CommitOutcome::Committed => [RowState::Detached, RowState::Detached, RowState::Deleted],
            _ => [RowState::Discarded, RowState::Detached, RowState::Detached],
        };
        rows.assert_decided(&outcome, wanted);
    }
}

/// A program that goes on with the key finds its row, and adds it again where it is not there.
fn keys_of_undecided_rows_can_be_used<C: Conn>(site: &Site)
where
    NewEntry: Insert<C>,
    Entry: Persist<C>,
{
    let proxy = proxy_of(site);
    let app = through::<C>(&proxy, site);
    for (moment, outcome, _) in MOMENTS {
        let inside = || {
            let session = C::db().session()?;
            let rows = Rows::change(&session)?;
            proxy.set(losing_commits(moment));
            session.commit().unwrap_err();
            proxy.set(Mode::Pass);
            let refreshed = session.refresh(&rows.new);
            match outcome {
                CommitOutcome::Committed => {
                    refreshed?;
                    assert_eq!(rows.new.state(), RowState::Persistent);
                    rows.new.write().message = "written".into();
                    session.commit()?;
                    assert!(session.number("SELECT count(*) AS number FROM entries WHERE message = 'written'")? == 1);
                }
                _ => {
                    assert!(refreshed.unwrap_err().is_not_found());
                    assert_eq!(rows.new.state(), RowState::Deleted);
                }
            }
            session.commit()
        };
        app.context(inside).unwrap();
    }
}
