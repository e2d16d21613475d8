//! Commits whose answer is lost, and what can be learned of them.

use std::thread;
use std::time::{Duration, Instant};

use diesel::connection::SimpleConnection;
use diesel::prelude::*;
use diesel_session::session::{CommitOutcome, Retry};
use diesel_session::unit_of_work::{Fk, RowState};
use diesel_session::unit_of_work::{Insert, Persist};
use diesel_session::{App, Config, Entity, Error, ErrorKind, Result, Session, Tracked};

use crate::fixtures::{AnyConnection, COUNT, INSERT, RegisteredApp, SessionExt, TestConnection, TestDatabase};
use crate::for_each_database;
use crate::support::proxy::{Mode, Moment, Proxy};
use crate::support::wait;

for_each_database!(every_server =>
    unknown_commit_resolves_to_what_the_server_stored,
    partial_commit_resolves_its_unknown_part,
    retry_repeats_an_unknown_commit_only_if_told_to,
    rows_are_undecided_until_the_commit_is_resolved,
    handles_that_outlive_their_scope_are_decided_too,
    keys_of_undecided_rows_can_be_used,
);
for_each_database!(only postgres =>
    unknown_commit_of_an_enum_resolves_on_postgres,
    unknown_commit_without_writes_is_rolled_back,
    resolve_waits_for_a_transaction_in_progress_until_acquire_timeout,
    resolve_without_a_connection_is_an_error_and_may_be_repeated,
);

const MOMENTS: [(Moment, CommitOutcome, i64); 2] =
    [(Moment::BeforeForwarding, CommitOutcome::RolledBack, 0), (Moment::BeforeAnswer, CommitOutcome::Committed, 1)];

fn losing_commits(moment: Moment) -> Mode {
    Mode::CutOn(b"COMMIT".to_vec(), moment)
}

fn through<C: TestConnection>(proxy: &Proxy, test_db: &TestDatabase) -> RegisteredApp<C> {
    let app = C::app(Config::new(test_db.url_at(proxy.port())));
    app.create_all().unwrap();
    app
}

fn proxy_of(test_db: &TestDatabase) -> Proxy {
    Proxy::to(("127.0.0.1", test_db.port()))
}

type Way<C> = fn(&App<C>) -> Result<()>;

/// The ways to a commit, each inserting a row.
fn ways<C: TestConnection>() -> [Way<C>; 4] {
    [
        |app| app.scope().resolvable().run_and_commit(|| C::db().session()?.send(INSERT)),
        |app| {
            app.scope().resolvable().run_and_commit(|| C::db().session()?.transaction(|session| session.send(INSERT)))
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

fn unknown_commit_resolves_to_what_the_server_stored<C: TestConnection>(test_db: &TestDatabase) {
    let proxy = proxy_of(test_db);
    let app = through::<C>(&proxy, test_db);
    let resolves = matches!(test_db, TestDatabase::Postgres(_));
    for (moment, outcome, rows) in MOMENTS {
        for insert in ways::<C>() {
            proxy.set(losing_commits(moment));
            let error = insert(&app).unwrap_err();
            assert!(error.kind() == ErrorKind::CommitUnknown && error.code() == "DS303", "{error}");
            assert_eq!(error.app(), Some(app.id()));
            assert!(
                error.location().unwrap().file().ends_with("commit_unknown.rs") && error.database_error().is_some()
            );
            assert!(std::error::Error::source(&error).is_some_and(|source| source.is::<diesel::result::Error>()));
            assert_eq!(error.to_string().contains("`resolve()` asks"), resolves, "{error}");
            proxy.set(Mode::Pass);
            let resolved = (error.resolve().unwrap(), error.resolve().unwrap());
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
        // The number costs a round trip, so it is not asked for by default.
        proxy.set(losing_commits(moment));
        let error = app.run(|| C::db().session()?.send(INSERT)).unwrap_err();
        proxy.set(Mode::Pass);
        let CommitOutcome::Unknown { reason } = error.resolve().unwrap() else { panic!("{error}") };
        assert!(reason.contains(if resolves { "resolvable()" } else { "MariaDB" }), "{reason}");
        app.run(|| C::db().session()?.send("DELETE FROM entries")).unwrap();
    }
    assert_eq!(app.status().in_use, 0);
}

fn unknown_commit_of_an_enum_resolves_on_postgres() {
    unknown_commit_resolves_to_what_the_server_stored::<AnyConnection>(&TestDatabase::postgres());
}

/// The first database has committed when the second one's answer is lost.
fn partial_commit_resolves_its_unknown_part<C: TestConnection>(test_db: &TestDatabase) {
    let proxy = proxy_of(test_db);
    let second = through::<C>(&proxy, test_db);
    let other = C::new_db();
    let first = other.init_app(second.id(), test_db.config()).unwrap();
    for (moment, outcome, rows) in MOMENTS {
        proxy.set(losing_commits(moment));
        let error = second.scope().resolvable().run_and_commit(|| {
            other.session()?.send(INSERT)?;
            C::db().session()?.send(INSERT)
        });
        proxy.set(Mode::Pass);
        let error = error.unwrap_err();
        assert!(
            error.kind() == ErrorKind::PartialCommit && error.to_string().contains("it is not known whether"),
            "{error}"
        );
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

fn retry_repeats_an_unknown_commit_only_if_told_to<C: TestConnection>(test_db: &TestDatabase) {
    let proxy = proxy_of(test_db);
    let app = through::<C>(&proxy, test_db);
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
fn unknown_commit_without_writes_is_rolled_back() {
    let test_db = TestDatabase::postgres();
    let proxy = proxy_of(&test_db);
    let app = through::<PgConnection>(&proxy, &test_db);
    proxy.set(losing_commits(Moment::BeforeAnswer));
    let read = || PgConnection::db().session()?.number(COUNT);
    let error = app.scope().resolvable().run_and_commit(read).unwrap_err();
    assert!(error.is_commit_unknown() && error.to_string().contains("nothing had been written"), "{error}");
    // No server has to be asked, and none could be.
    proxy.set(Mode::Refuse);
    assert_eq!(error.resolve().unwrap(), CommitOutcome::RolledBack);
}

/// Makes a commit wait for the holder of the advisory lock 7.
const WAIT_AT_COMMIT: &str = "
    CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN PERFORM pg_advisory_xact_lock(7); RETURN NULL; END $$;
    CREATE CONSTRAINT TRIGGER waits AFTER INSERT ON entries DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION wait()";

/// The server is still at it, and has not noticed that its client has gone.
fn resolve_waits_for_a_transaction_in_progress_until_acquire_timeout() {
    const PATIENCE: Duration = Duration::from_secs(1);
    let test_db = TestDatabase::postgres();
    let proxy = proxy_of(&test_db);
    let app = PgConnection::app(Config::new(test_db.url_at(proxy.port())).acquire_timeout(PATIENCE));
    app.create_all().unwrap();
    let mut blocker = PgConnection::establish(&test_db.url()).unwrap();
    blocker.batch_execute(WAIT_AT_COMMIT).unwrap();
    blocker.batch_execute("SELECT pg_advisory_lock(7)").unwrap();
    let error = thread::scope(|threads| {
        threads.spawn(|| {
            let waiting = "SELECT count(*) AS number FROM pg_locks WHERE locktype = 'advisory' AND NOT granted";
            while blocker.number(waiting).unwrap() == 0 {}
            proxy.cut_all();
        });
        let insert = || PgConnection::db().session()?.send(INSERT);
        app.scope().resolvable().run_and_commit(insert).unwrap_err()
    });
    assert!(error.is_commit_unknown(), "{error}");

    let started = Instant::now();
    let CommitOutcome::Unknown { reason } = error.resolve().unwrap() else { panic!("it has not ended") };
    let waited = started.elapsed();
    assert!(reason.contains("in progress"), "{reason}");
    assert!(
        waited > PATIENCE / 2 && waited < PATIENCE + Duration::from_millis(500),
        "`resolve` ends at `acquire_timeout`: {waited:?}"
    );

    let before = proxy.sent();
    let outcome = thread::scope(|threads| {
        threads.spawn(|| {
            // Once `resolve` has asked the server.
            wait::until(PATIENCE, || proxy.sent() > before);
            blocker.batch_execute("SELECT pg_advisory_unlock(7)").unwrap();
        });
        error.resolve().unwrap()
    });
    assert_eq!(outcome, CommitOutcome::Committed);
    assert_eq!(app.open_session().unwrap().number(COUNT).unwrap(), 1);
}

/// A failed query is an error, and may be repeated.
fn resolve_without_a_connection_is_an_error_and_may_be_repeated() {
    let test_db = TestDatabase::postgres();
    let proxy = proxy_of(&test_db);
    let app = through::<PgConnection>(&proxy, &test_db);
    proxy.set(losing_commits(Moment::BeforeAnswer));
    let insert = || PgConnection::db().session()?.send(INSERT);
    let error = app.scope().resolvable().run_and_commit(insert).unwrap_err();
    proxy.set(Mode::HangUp);
    let refused = error.resolve().unwrap_err();
    assert!(refused.kind() == ErrorKind::Connect, "{refused}");
    proxy.set(Mode::Pass);
    app.dispose().unwrap();
    assert_eq!(error.resolve().unwrap(), CommitOutcome::Committed, "a fresh pool is made for it");
    PgConnection::db().remove_app(app.id()).unwrap();
    assert!(error.resolve().unwrap_err().is_disposed());
}

/// `resolve` answers for every error.
#[test]
fn resolve_of_other_errors_knows_no_commit() {
    let other = Error::from(diesel::result::Error::NotFound);
    let CommitOutcome::Unknown { reason } = other.resolve().unwrap() else { panic!("it knows nothing") };
    assert!(reason.contains("DS301"), "{reason}");
}

diesel::table! {
    entries (id) { id -> Integer, author -> Text, message -> Text, }
}

#[derive(Debug, Clone, Queryable, Selectable, Entity)]
#[diesel(table_name = entries)]
#[entity(new = NewEntry, connection = AnyConnection)]
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
    fn change<C: TestConnection>(session: &Session<C>) -> Result<Self>
    where
        NewEntry: Insert<C>,
        Entry: Persist<C>,
    {
        let (changed, deleted) = (session.add(entry("before"))?, session.add(entry("deleted"))?);
        session.flush()?;
        session.commit()?;
        let (changed, deleted) = (session.find::<Entry>(changed.read().id)?, session.find::<Entry>(deleted.read().id)?);
        let new = session.add(entry("new"))?;
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
        assert!(
            refused.kind() == ErrorKind::WrongState && refused.row_state() == Some(RowState::Undecided),
            "{refused}"
        );
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
fn stored(test_db: &TestDatabase) -> Vec<String> {
    let query = entries::table.order(entries::id).select(entries::message);
    match test_db {
        TestDatabase::Postgres(_) => query.load(&mut PgConnection::establish(&test_db.url()).unwrap()),
        _ => query.load(&mut MysqlConnection::establish(&test_db.url()).unwrap()),
    }
    .unwrap()
}

fn rows_are_undecided_until_the_commit_is_resolved<C: TestConnection>(test_db: &TestDatabase)
where
    NewEntry: Insert<C>,
    Entry: Persist<C>,
{
    let proxy = proxy_of(test_db);
    let app = through::<C>(&proxy, test_db);
    let resolves = matches!(test_db, TestDatabase::Postgres(_));
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
            assert_eq!(stored(test_db), wanted);
        }
    }
}

/// The caller of a scope gets the error when the session is gone.
fn handles_that_outlive_their_scope_are_decided_too<C: TestConnection>(test_db: &TestDatabase)
where
    NewEntry: Insert<C>,
    Entry: Persist<C>,
{
    let proxy = proxy_of(test_db);
    let app = through::<C>(&proxy, test_db);
    let resolves = matches!(test_db, TestDatabase::Postgres(_));
    for ((moment, _, _), (outcome, _)) in MOMENTS.into_iter().zip(DECIDED) {
        let mut kept = None;
        let error = app.scope().resolvable().run_and_commit(|| {
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
fn keys_of_undecided_rows_can_be_used<C: TestConnection>(test_db: &TestDatabase)
where
    NewEntry: Insert<C>,
    Entry: Persist<C>,
{
    let proxy = proxy_of(test_db);
    let app = through::<C>(&proxy, test_db);
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
