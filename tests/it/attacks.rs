//! Ways by which programs get a session, its connection or its transaction into a state it does not expect.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use diesel::connection::InstrumentationEvent;
use diesel::prelude::*;
use diesel_session::{Config, ConnectionGuard, Database, Error, Session};

use crate::fixtures::{COUNT, Conn, INSERT, Site, Speak, unique};
use crate::{on_every_database, on_every_server};

on_every_database!(
    a_savepoint_that_lets_the_connection_out_keeps_nothing,
    a_transaction_that_lets_the_connection_out_is_over,
    replaced_instrumentation_is_noticed,
    a_connection_put_in_the_place_of_another_is_not_pooled,
    swapped_connections_commit_nothing,
    a_context_that_ends_before_a_lent_connection,
    read_only_stays_read_only,
    a_hook_that_rolls_back_prevents_the_commit,
    hooks_after_one_that_refused_are_kept,
    a_hook_whose_drop_panics_changes_nothing,
    a_failed_statement_is_noticed_whatever_loads_it,
);
on_every_server!(
    long_limits_are_limits,
    a_deadline_does_not_lift_the_statement_timeout,
    autocommit_with_a_deadline_survives_a_lost_connection,
    backslashes_do_not_hide_a_commit,
);

fn prepared<C: Conn>(config: Config) -> crate::fixtures::Guard<C> {
    let app = C::app(config);
    app.create_all().unwrap();
    app
}

fn entries<C: Conn>(app: &diesel_session::App<C>) -> i64 {
    app.open_session().unwrap().number(COUNT).unwrap()
}

fn a_savepoint_that_lets_the_connection_out_keeps_nothing<C: Conn>(site: &Site) {
    let app = prepared::<C>(site.config());
    let session = app.open_session().unwrap();
    session.send(INSERT).unwrap();
    let out: Result<ConnectionGuard<C>, Error> = session.savepoint(|session| {
        session.send(INSERT)?;
        session.connection()
    });
    assert!(matches!(out, Err(Error::SessionBusy { .. })));
    let committed = session.commit();
    assert!(committed.as_ref().is_err_and(Error::is_rollback_required), "{committed:?}");
    session.rollback().unwrap();
    assert_eq!(entries(&app), 0);
}

fn a_transaction_that_lets_the_connection_out_is_over<C: Conn>(site: &Site) {
    let app = prepared::<C>(site.config());
    let session = app.open_session().unwrap();
    let out: Result<ConnectionGuard<C>, Error> = session.transaction(|session| {
        session.send(INSERT)?;
        session.connection()
    });
    assert!(matches!(out, Err(Error::SessionBusy { .. })));
    let committed = session.commit();
    assert!(committed.as_ref().is_err_and(Error::is_rollback_required), "{committed:?}");
    session.rollback().unwrap();
    assert_eq!(entries(&app), 0);
}

fn replaced_instrumentation_is_noticed<C: Conn>(site: &Site) {
    let app = prepared::<C>(site.config().max_size(1));
    let session = app.open_session().unwrap();
    session.send(INSERT).unwrap();
    let replaced = session.with(|conn| {
        conn.set_instrumentation(|_: InstrumentationEvent<'_>| {});
        let _ = conn.batch_execute("SELECT * FROM nowhere_at_all");
        Ok(())
    });
    replaced.unwrap();
    let committed = session.commit();
    assert!(committed.as_ref().is_err_and(Error::is_rollback_required), "{committed:?}");
    session.rollback().unwrap();
    assert_eq!((entries(&app), app.status().open), (0, 1));
}

fn a_connection_put_in_the_place_of_another_is_not_pooled<C: Conn>(site: &Site) {
    let app = prepared::<C>(site.config().max_size(1));
    let other = C::app(site.config());
    let url = site.url();
    let session = app.open_session().unwrap();
    session.send(INSERT).unwrap();
    session
        .with(|conn| {
            // The same as `*conn = C::establish(..)`, for the enum too.
            *conn = connect::<C>(&url);
            Ok(())
        })
        .unwrap();
    session.rollback().unwrap();
    assert_eq!(app.status().open, 0);
    drop(other);
}

fn connect<C: Conn>(url: &str) -> C {
    let any: Box<dyn std::any::Any> = if std::any::TypeId::of::<C>() == std::any::TypeId::of::<crate::fixtures::Any>() {
        Box::new(crate::fixtures::connect_any(url).unwrap())
    } else {
        Box::new(C::establish(url).unwrap())
    };
    *any.downcast().expect("of this type")
}

fn swapped_connections_commit_nothing<C: Conn>(site: &Site) {
    if matches!(site, Site::Sqlite(_)) {
        return; // One writer at a time.
    }
    let app = prepared::<C>(site.config());
    let (one, two) = (app.open_session().unwrap(), app.open_session().unwrap());
    one.send(INSERT).unwrap();
    let (mut first, mut second) = (one.connection().unwrap(), two.connection().unwrap());
    std::mem::swap(&mut *first, &mut *second);
    drop((first, second));
    // Session `two` did nothing: what `one` did must not be committed by it.
    let committed = two.commit();
    assert!(committed.as_ref().is_err_and(Error::is_rollback_required), "{committed:?}");
    drop((one, two));
    assert_eq!(entries(&app), 0);
}

fn a_context_that_ends_before_a_lent_connection<C: Conn>(site: &Site) {
    let app = prepared::<C>(site.config());
    let kept = app
        .scope()
        .read_only()
        .deadline(Duration::from_secs(60))
        .run(|| {
            let session = C::db().session()?;
            session.connection()
        })
        .unwrap();
    assert_eq!(app.status().in_use, 1);
    drop(kept);
    assert_eq!((app.status().in_use, app.dispose_report().unwrap().is_complete()), (0, true));
}

fn read_only_stays_read_only<C: Conn>(site: &Site) {
    let app = prepared::<C>(site.config());
    let written = app.scope().read_only().autocommit().run(|| C::db().session()?.send(INSERT));
    assert!(matches!(written, Err(Error::Query { .. })), "{written:?}");
    assert_eq!(entries(&app), 0);
}

fn a_hook_that_rolls_back_prevents_the_commit<C: Conn>(site: &Site) {
    let app = prepared::<C>(site.config());
    let committed = app.scope().commit_on_ok().run(|| {
        let session = C::db().session()?;
        session.send(INSERT)?;
        session.before_commit(|| C::db().session()?.rollback())
    });
    assert!(matches!(committed, Err(Error::HookFailed { committed: false, .. })), "{committed:?}");
    assert_eq!(entries(&app), 0);
}

fn hooks_after_one_that_refused_are_kept<C: Conn>(site: &Site) {
    let app = prepared::<C>(site.config());
    let checked = Rc::new(Cell::new(false));
    app.context(|| {
        let session = C::db().session().unwrap();
        session.send(INSERT).unwrap();
        session.before_commit(|| -> () { panic!("refused") }).unwrap();
        let check = Rc::clone(&checked);
        session.before_commit(move || check.set(true)).unwrap();
        session.commit().unwrap_err();
        assert!(!checked.get());
        session.commit().unwrap();
    });
    assert!(checked.get());
}

struct Bomb;

impl Drop for Bomb {
    fn drop(&mut self) {
        panic!("a value that panics in its drop");
    }
}

fn a_hook_whose_drop_panics_changes_nothing<C: Conn>(site: &Site) {
    let app = prepared::<C>(site.config());
    let kept: RefCell<Option<Session<C>>> = RefCell::new(None);
    app.context(|| {
        let session = C::db().session().unwrap();
        session.send(INSERT).unwrap();
        let bomb = Bomb;
        session
            .after_commit(move || {
                let _bomb = &bomb;
            })
            .unwrap();
        *kept.borrow_mut() = Some(session);
    });
    let kept = kept.into_inner().unwrap();
    assert!(matches!(kept.send(INSERT), Err(Error::SessionEnded { .. })));
    assert_eq!(app.status().in_use, 0);
}

fn a_failed_statement_is_noticed_whatever_loads_it<C: Conn>(site: &Site) {
    let app = prepared::<C>(site.config());
    let session = app.open_session().unwrap();
    let fails = match site {
        Site::Sqlite(_) => {
            let sql = "CREATE TRIGGER no BEFORE INSERT ON entries WHEN NEW.author = 'no' \
                       BEGIN SELECT RAISE(ROLLBACK, 'no'); END";
            session.send(sql).unwrap();
            session.commit().unwrap();
            "INSERT INTO entries (author, message) VALUES ('no', '') RETURNING 1 AS number"
        }
        Site::Postgres(_) => "SELECT (1 / 0)::bigint AS number",
        Site::Mysql(_) => return,
    };
    for swallowed in [false, true] {
        session.send(INSERT).unwrap();
        if swallowed {
            session
                .with(|conn| {
                    let _ = conn.number(fails);
                    Ok(())
                })
                .unwrap();
        } else {
            session.number(fails).unwrap_err();
        }
        let gone_on = session.send(INSERT);
        assert!(gone_on.as_ref().is_err_and(Error::is_rollback_required), "{swallowed} {gone_on:?}");
        session.rollback().unwrap();
        assert_eq!(entries(&app), 0, "{swallowed}");
    }
}

fn long_limits_are_limits<C: Conn>(site: &Site) {
    const LONG: Duration = Duration::from_secs(360 * 24 * 3600);
    let app = C::app(site.config().statement_timeout(LONG).lock_timeout(LONG));
    app.create_all().unwrap();
    for limit in [LONG, Duration::from_secs(1 << 40), Duration::MAX] {
        app.scope().deadline(limit).run(|| C::db().session()?.send(INSERT)).unwrap();
        app.scope().autocommit().deadline(limit).run(|| C::db().session()?.send(INSERT)).unwrap();
    }
}

fn a_deadline_does_not_lift_the_statement_timeout<C: Conn>(site: &Site) {
    let app = C::app(site.config().statement_timeout(Duration::from_millis(200)));
    let slow = match site {
        Site::Postgres(_) => "SELECT pg_sleep(3)",
        _ => "SELECT SLEEP(3)",
    };
    for autocommit in [false, true] {
        let scope = app.scope().deadline(Duration::from_secs(60));
        let scope = if autocommit { scope.autocommit() } else { scope };
        let started = std::time::Instant::now();
        let _ = scope.run(|| C::db().session()?.send(slow));
        assert!(started.elapsed() < Duration::from_secs(2), "{autocommit}: {:?}", started.elapsed());
    }
}

fn autocommit_with_a_deadline_survives_a_lost_connection<C: Conn>(site: &Site) {
    let app = prepared::<C>(site.config());
    app.scope()
        .autocommit()
        .deadline(Duration::from_secs(60))
        .run(|| {
            let session = C::db().session()?;
            session.send(INSERT)?;
            // While it is in use: an idle one may be replaced.
            let lost = session.with(|conn| {
                site.terminate_all();
                site.assert_connections(0);
                conn.batch_execute(INSERT)
            });
            assert!(matches!(&lost, Err(Error::ConnectionLost { in_transaction: false, .. })), "{lost:?}");
            assert_eq!(app.status().in_use, 0);
            session.send(INSERT)
        })
        .unwrap();
    assert_eq!(entries(&app), 2);
}

fn backslashes_do_not_hide_a_commit<C: Conn>(site: &Site) {
    let app = prepared::<C>(site.config());
    let session = app.open_session().unwrap();
    let e = if matches!(site, Site::Postgres(_)) { "E" } else { "" };
    session.send(&format!("INSERT INTO entries (author, message) VALUES ({e}'it\\'s', 'x; commit')")).unwrap();
    session.commit().unwrap();
    session.send(&format!("INSERT INTO entries (author, message) VALUES ({e}'\\'', 'x'); COMMIT; BEGIN")).unwrap();
    let gone_on = session.send(INSERT);
    assert!(gone_on.as_ref().is_err_and(Error::is_rollback_required), "{gone_on:?}");
    session.rollback().unwrap();
    assert_eq!(entries(&app), 2);
}

#[test]
fn mysql_maintenance_commits() {
    if !crate::support::enabled(crate::support::Kind::Mysql) {
        return;
    }
    let site = Site::mysql();
    let app = prepared::<diesel::MysqlConnection>(site.config());
    for sql in ["CHECK TABLE entries", "/*M! COMMIT */", "EXECUTE IMMEDIATE 'COMMIT'", "SELECT 1 # it's\n; COMMIT"] {
        let session = app.open_session().unwrap();
        session.send(INSERT).unwrap();
        session.send(sql).unwrap();
        let gone_on = session.send(INSERT);
        assert!(gone_on.as_ref().is_err_and(Error::is_rollback_required), "{sql}: {gone_on:?}");
    }
}

#[test]
fn urls_that_drivers_take() {
    static DB: Database<SqliteConnection> = Database::without_migrations();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.sqlite");
    for url in [format!("file://{}", path.display()), format!("file://{}?mode=rwc", path.display())] {
        let app = DB.init_app(unique("url"), Config::new(url)).unwrap();
        app.ping().unwrap();
        DB.remove_app(app.id()).unwrap();
    }
    assert!(path.exists());
    if crate::support::enabled(crate::support::Kind::Postgres) {
        let site = Site::postgres();
        for end in ["?", "?sslmode=prefer&"] {
            PgConnection::app(Config::new(site.url() + end)).ping().unwrap();
        }
    }
}

#[test]
fn a_session_in_a_thread_local() {
    thread_local! { static KEPT: RefCell<Option<Session<SqliteConnection>>> = const { RefCell::new(None) }; }
    struct Last;
    impl Drop for Last {
        fn drop(&mut self) {
            let _ = SqliteConnection::db().session();
        }
    }
    thread_local! { static LAST: Last = const { Last }; }
    let site = Site::sqlite();
    let app = prepared::<SqliteConnection>(site.config());
    let inner = app.clone();
    std::thread::spawn(move || {
        LAST.with(|_| ());
        let session = inner.open_session().unwrap();
        session.send(INSERT).unwrap();
        KEPT.with(|kept| *kept.borrow_mut() = Some(session));
    })
    .join()
    .unwrap();
    assert_eq!(entries(&app), 0);
    assert_eq!(app.status().in_use, 0);
}

#[test]
fn a_session_that_a_hook_opens_is_committed() {
    static OTHER: Database<SqliteConnection> = Database::without_migrations();
    let (site, other_site) = (Site::sqlite(), Site::sqlite());
    let app = prepared::<SqliteConnection>(site.config());
    prepared::<SqliteConnection>(other_site.config());
    let other = OTHER.init_app(app.id(), other_site.config()).unwrap();
    app.scope()
        .commit_on_ok()
        .run(|| {
            let session = SqliteConnection::db().session()?;
            session.send(INSERT)?;
            session.before_commit(|| OTHER.session()?.send(INSERT))
        })
        .unwrap();
    assert_eq!((entries(&app), entries(&other)), (1, 1));
}

#[test]
fn a_lifetime_shorter_than_a_connect() {
    static CONNECTS: AtomicUsize = AtomicUsize::new(0);
    static DB: Database<SqliteConnection> = Database::without_migrations().connect_with(|url| {
        CONNECTS.fetch_add(1, Ordering::SeqCst);
        SqliteConnection::establish(url)
    });
    let site = Site::sqlite();
    let app = DB.init_app(unique("app"), site.config().max_lifetime(Duration::from_nanos(1))).unwrap();
    app.ping().unwrap();
    app.ping().unwrap();
    assert_eq!(CONNECTS.load(Ordering::SeqCst), 2);
}

/// Four connects of one application hang; another, whose connection was idle for long enough to be asked, notices nothing.
#[test]
fn hung_connects_of_one_application_delay_no_other() {
    static SLOW: AtomicBool = AtomicBool::new(false);
    static DB: Database<PgConnection> = Database::without_migrations().connect_with(|url| {
        if SLOW.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_secs(2));
        }
        PgConnection::establish(url)
    });
    if !crate::support::enabled(crate::support::Kind::Postgres) {
        return;
    }
    let site = Site::postgres();
    let config = || site.config().connect_timeout(Duration::from_millis(300)).acquire_timeout(Duration::from_secs(1));
    let app = DB.init_app(unique("app"), config().max_size(1)).unwrap();
    let other = DB.init_app(unique("app"), config()).unwrap();
    app.ping().unwrap();
    std::thread::sleep(Duration::from_millis(600));
    SLOW.store(true, Ordering::SeqCst);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| other.ping().unwrap_err());
        }
        std::thread::sleep(Duration::from_millis(100));
        let started = std::time::Instant::now();
        app.ping().unwrap();
        assert!(started.elapsed() < Duration::from_millis(250), "{:?}", started.elapsed());
    });
    SLOW.store(false, Ordering::SeqCst);
    DB.dispose_all().unwrap();
}

#[test]
fn a_text_without_a_statement_aborts_nothing() {
    if !crate::support::enabled(crate::support::Kind::Postgres) {
        return;
    }
    let site = Site::postgres();
    let app = prepared::<PgConnection>(site.config());
    let session = app.open_session().unwrap();
    session.send(INSERT).unwrap();
    session.send("-- nothing").unwrap_err();
    session.commit().unwrap();
    assert_eq!(entries(&app), 1);
    // Nor does it heal anything.
    session.send("SELECT * FROM nowhere_at_all; ").unwrap_err();
    session.rollback().unwrap();
    session
        .with(|conn| {
            let _ = (conn.number("SELECT 1 / 0 AS number"), conn.number(""));
            Ok(())
        })
        .unwrap();
    assert!(session.commit().unwrap_err().is_rollback_required());
}
