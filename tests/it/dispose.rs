//! `dispose`, `dispose_all` and `remove_app`.

use std::panic::Location;
use std::sync::mpsc::{self, Sender};
use std::thread::{self, ScopedJoinHandle};
use std::time::Duration;

use diesel::prelude::*;
use diesel::result::ConnectionResult;
use diesel_session::{App, AppEnd, Config, Database, DisposeReport, Error};

use crate::fixtures::threads::together;
use crate::fixtures::{COUNT, Conn, INSERT, Site, Speak, many_connections, shown};
use crate::support::proxy::{Mode, Proxy};
use crate::support::{Kind, enabled, mariadb, postgres, wait};
use crate::{on_every_database, on_every_server};

on_every_database!(
    held_connections_are_waited_for,
    one_that_does_not_return_is_named,
    the_callers_own_is_reported,
    many_times_and_from_many_threads,
    waiters_are_sent_away,
    a_fresh_pool_afterwards,
    removed_handles_answer_disposed,
);

/// A connection held by a thread of its own, with the place where it was taken.
struct Held<'s> {
    place: &'static Location<'static>,
    release: Sender<()>,
    thread: ScopedJoinHandle<'s, ()>,
}

impl Held<'_> {
    fn release(self) {
        self.release.send(()).unwrap();
        self.thread.join().unwrap();
    }
}

/// Runs `body`; the place of the call.
#[track_caller]
fn here(body: impl FnOnce()) -> &'static Location<'static> {
    body();
    Location::caller()
}

fn held_connections_are_waited_for<C: Conn>(site: &Site) {
    let _many = many_connections();
    let (idle, held) = (8, 4);
    let app = C::app(site.config().max_size(12));
    // SQLite keeps the handles of closed connections as long as others have the file locked.
    let assert_open = |wanted| match site {
        Site::Sqlite(_) => {}
        _ => site.assert_connections(wanted),
    };
    thread::scope(|scope| {
        let readers: Vec<_> =
            (0..idle + held).map(|number| hold_reading(scope, &app, &format!("reader-{number}"))).collect();
        assert_eq!(app.status().in_use, idle + held);
        let mut readers = readers.into_iter();
        readers.by_ref().take(idle).for_each(Held::release);
        assert_eq!((app.status().idle, app.status().in_use), (idle, held));
        site.assert_connections(idle + held);

        let disposal = scope.spawn(|| app.dispose_report());
        assert_open(held);
        for left in (0..held).rev() {
            assert!(!disposal.is_finished());
            readers.next().unwrap().release();
            assert_open(left);
        }
        let report: DisposeReport = disposal.join().unwrap().unwrap();
        assert_eq!((report.closed, report.still_out.len(), report.connecting), (idle + held, 0, 0), "{report}");
        assert!(report.is_complete() && !report.waited.is_zero());
        assert_eq!(report.apps, [app.id()]);
    });
    site.assert_connections(0);
}

/// Returns when it holds a connection that reads, of which SQLite too has many.
fn hold_reading<'s, C: Conn>(scope: &'s thread::Scope<'s, '_>, app: &App<C>, name: &str) -> Held<'s> {
    let (release, released) = mpsc::channel::<()>();
    let (tell, told) = mpsc::channel();
    let app = app.clone();
    let thread = thread::Builder::new().name(name.into()).spawn_scoped(scope, move || {
        app.scope()
            .read_only()
            .run(|| {
                let session = C::db().session()?;
                let place = here(|| session.begin().unwrap());
                tell.send(place).unwrap();
                let _ = released.recv();
                Ok::<_, Error>(())
            })
            .unwrap();
    });
    let place = told.recv().expect("it has a connection");
    Held { place, release, thread: thread.unwrap() }
}

fn one_that_does_not_return_is_named<C: Conn>(site: &Site) {
    let app = C::app(site.config());
    thread::scope(|scope| {
        let held = hold_reading(scope, &app, "the-sleeper");
        let error = app.dispose_within(Duration::from_millis(50)).unwrap_err();
        let Error::StillInUse(report) = &error else { panic!("{error}") };
        assert_eq!(report.still_out.len(), 1);
        assert_eq!(report.still_out[0].thread_name(), "the-sleeper");
        assert!(!report.is_complete() && error.is_timeout());
        let text = error.to_string();
        assert!(text.contains(&shown(held.place)) && text.contains("the-sleeper"), "{text}");
        site.assert_connections(1);
        held.release();
        site.assert_connections(0);
        // Nothing is left of it for the next disposal.
        let report = app.dispose_report().unwrap();
        assert!(report.is_complete() && report.closed == 0, "{report}");
    });
}

fn the_callers_own_is_reported<C: Conn>(site: &Site) {
    let app = C::app(site.config());
    app.create_all().unwrap();
    app.context(|| {
        let session = C::db().session().unwrap();
        let place = here(|| session.send(INSERT).unwrap());
        let report = app.dispose_report().unwrap();
        assert_eq!((report.still_out.len(), report.closed), (1, 0), "{report}");
        assert!(report.to_string().contains(&shown(place)), "{report}");
        assert!(!report.is_complete());
        // It goes on until it ends, and is closed then.
        assert_eq!(session.number(COUNT).unwrap(), 1);
        session.commit().unwrap();
        site.assert_connections(0);
        assert_eq!(session.number(COUNT).unwrap(), 1, "committed, and seen through a fresh pool");
    });
    assert_eq!(app.dispose_report().unwrap().closed, 1);
    site.assert_connections(0);
}

fn many_times_and_from_many_threads<C: Conn>(site: &Site) {
    let app = C::app(site.config().max_size(3).idle_timeout(Duration::from_millis(1)));
    for _ in 0..40 {
        let sessions: Vec<_> = (0..3).map(|_| app.open_session().unwrap()).collect();
        app.scope().read_only().run(|| C::db().session()?.begin()).unwrap();
        drop(sessions);
        let reports = together(4, |_| app.dispose_report().unwrap());
        assert!(reports.iter().all(DisposeReport::is_complete), "{reports:?}");
        assert_eq!((app.status().open, app.status().holders.len()), (0, 0));
    }
    assert_eq!(app.dispose_report().unwrap().closed, 0);
    site.assert_connections(0);
}

fn waiters_are_sent_away<C: Conn>(site: &Site) {
    let app = C::app(site.config().max_size(1).acquire_timeout(Duration::from_secs(30)));
    thread::scope(|scope| {
        let held = hold_reading(scope, &app, "holder");
        let waiters: Vec<_> = (0..5).map(|_| scope.spawn(|| app.ping())).collect();
        assert!(wait::until(Duration::from_secs(5), || app.status().waiting == 5));
        let disposal = scope.spawn(|| app.dispose_report());
        for waiter in waiters {
            let error = waiter.join().unwrap().unwrap_err();
            assert!(
                matches!(&error, Error::Disposed { app: named, how: AppEnd::Disposed } if named == app.id()),
                "{error}"
            );
        }
        held.release();
        assert_eq!(disposal.join().unwrap().unwrap().closed, 1);
    });
    site.assert_connections(0);
    app.ping().unwrap();
}

fn a_fresh_pool_afterwards<C: Conn>(site: &Site) {
    let app = C::app(site.config());
    app.create_all().unwrap();
    for round in 1..=3 {
        app.scope().commit_on_ok().run(|| C::db().session()?.send(INSERT)).unwrap();
        assert_eq!(app.status().open, 1);
        assert_eq!(app.dispose_report().unwrap().closed, 1);
        assert_eq!((app.status().open, app.status().idle), (0, 0));
        site.assert_connections(0);
        assert_eq!(app.open_session().unwrap().number(COUNT).unwrap(), round);
    }
    assert!(C::db().app(app.id()).is_ok(), "it stays registered");
}

fn removed_handles_answer_disposed<C: Conn>(site: &Site) {
    let db = C::db();
    let app = C::app(site.config());
    let session = app.open_session().unwrap();
    app.ping().unwrap();
    assert_eq!(db.remove_app(app.id()).unwrap().closed, 1);
    site.assert_connections(0);
    let disposed = |error: Error| assert!(matches!(error, Error::Disposed { how: AppEnd::Removed, .. }), "{error}");
    disposed(app.ping().unwrap_err());
    disposed(app.create_all().unwrap_err());
    disposed(app.migrations().unwrap_err());
    disposed(app.open_session().unwrap_err());
    disposed(session.begin().unwrap_err());
    disposed(app.context(|| db.session()).unwrap_err());
    assert!(matches!(db.app(app.id()).unwrap_err(), Error::UnknownApp { .. }));
    assert!(matches!(db.remove_app(app.id()).unwrap_err(), Error::UnknownApp { .. }));
    assert_eq!(app.dispose_report().unwrap().closed, 0);
    // The id is free, and the new application has nothing to do with the old handle.
    let again = db.init_app(app.id(), site.config()).unwrap();
    again.ping().unwrap();
    disposed(app.ping().unwrap_err());
    db.remove_app(again.id()).unwrap();
    site.assert_connections(0);
}

on_every_server!(while_connecting);

fn while_connecting<C: Conn>(site: &Site) {
    let proxy = Proxy::to(("127.0.0.1", site.port()));
    proxy.set(Mode::Delay(Duration::from_millis(300)));
    let app = C::app(Config::new(site.url_at(proxy.port())));
    thread::scope(|scope| {
        let caller = scope.spawn(|| app.ping());
        assert!(wait::until(Duration::from_secs(5), || app.status().connecting == 1));
        let report = app.dispose_report().unwrap();
        assert!(report.is_complete(), "{report}");
        let error = caller.join().unwrap().unwrap_err();
        assert!(error.is_disposed(), "{error}");
    });
    site.assert_connections(0);
    proxy.set(Mode::Pass);
    app.ping().unwrap();
}

/// A connect that takes longer than the disposal waits.
#[test]
fn a_connect_that_does_not_return_is_counted() {
    if !enabled(Kind::Postgres) {
        return;
    }
    let site = Site::postgres();
    let proxy = Proxy::to(("127.0.0.1", site.port()));
    proxy.set(Mode::Silent);
    let app = PgConnection::app(Config::new(site.url_at(proxy.port())));
    thread::scope(|scope| {
        let caller = scope.spawn(|| app.ping());
        // Under way, and not only ordered.
        assert!(wait::until(Duration::from_secs(5), || proxy.accepted() == 1));
        let error = app.dispose_within(Duration::from_millis(50)).unwrap_err();
        let Error::StillInUse(report) = &error else { panic!("{error}") };
        assert_eq!(report.connecting, 1, "{report}");
        proxy.set(Mode::Pass);
        assert!(caller.join().unwrap().unwrap_err().is_disposed());
        assert!(app.dispose_report().unwrap().is_complete());
    });
    site.assert_connections(0);
}

fn the_database_can_be_dropped_at_once<C: Conn>(create: impl Fn() -> crate::support::Database, drop: impl Fn(&str)) {
    for _ in 0..50 {
        let database = create();
        let app = C::app(Config::new(database.url()).max_size(2));
        let (one, other) = (app.open_session().unwrap(), app.open_session().unwrap());
        one.begin().unwrap();
        other.begin().unwrap();
        std::mem::drop((one, other));
        assert_eq!(app.dispose_report().unwrap().closed, 2);
        drop(database.name());
    }
}

#[test]
fn postgres_drops_the_database_at_once() {
    if enabled(Kind::Postgres) {
        let admin = std::cell::RefCell::new(postgres().admin());
        the_database_can_be_dropped_at_once::<PgConnection>(
            || postgres().create_database(),
            |name| {
                diesel::sql_query(format!("DROP DATABASE {name}")).execute(&mut *admin.borrow_mut()).unwrap();
            },
        );
    }
}

#[test]
fn mysql_drops_the_database_at_once() {
    if enabled(Kind::Mysql) {
        let admin = std::cell::RefCell::new(mariadb().admin());
        the_database_can_be_dropped_at_once::<MysqlConnection>(
            || mariadb().create_database(),
            |name| {
                diesel::sql_query(format!("DROP DATABASE {name}")).execute(&mut *admin.borrow_mut()).unwrap();
            },
        );
    }
}

/// SQLite in memory: one database for all connections of the application, until it is disposed of.
#[test]
fn memory_lives_until_it_is_disposed_of() {
    fn check<C: Conn>() {
        let app = C::app(Config::new(":memory:").max_size(4).idle_timeout(Duration::from_millis(2)));
        let other = C::app(Config::new(":memory:"));
        assert_eq!(app.create_all().unwrap().len(), 1);
        app.scope().commit_on_ok().run(|| C::db().session()?.send(INSERT)).unwrap();
        for _ in 0..3 {
            assert!(wait::until(Duration::from_secs(5), || app.status().open == 0), "{}", app.status());
            assert_eq!(app.create_all().unwrap(), Vec::<String>::new());
        }
        thread::scope(|scope| {
            let readers: Vec<_> = (0..3).map(|number| hold_reading(scope, &app, &format!("reader-{number}"))).collect();
            assert_eq!(app.open_session().unwrap().number(COUNT).unwrap(), 1, "a fourth connection");
            readers.into_iter().for_each(Held::release);
        });
        assert_eq!(other.create_all().unwrap().len(), 1, "another application has another database");
        assert_eq!(other.open_session().unwrap().number(COUNT).unwrap(), 0);
        app.dispose().unwrap();
        assert_eq!(app.create_all().unwrap().len(), 1, "gone");
        assert_eq!(app.open_session().unwrap().number(COUNT).unwrap(), 0);
    }
    check::<SqliteConnection>();
    check::<crate::fixtures::Any>();
}

#[test]
fn all_applications_at_once() {
    let db: Database<SqliteConnection> = Database::without_migrations();
    let sites: Vec<_> = (0..5).map(|_| Site::sqlite()).collect();
    let ids = ["a", "b", "c", "d", "e"];
    let apps: Vec<_> = ids.into_iter().zip(&sites).map(|(id, site)| db.init_app(id, site.config()).unwrap()).collect();
    apps[..4].iter().for_each(|app| app.ping().unwrap());
    let report = db.dispose_all_report().unwrap();
    assert_eq!((report.closed, report.apps.len()), (4, 5));
    sites.iter().for_each(|site| site.assert_connections(0));
    assert!(db.status().iter().all(|status| status.open == 0));
    apps[4].ping().unwrap();

    // The first has one that is out; the last is closed all the same before anybody waits.
    thread::scope(|scope| {
        let (tell, told) = mpsc::channel();
        let (release, released) = mpsc::channel::<()>();
        let app = &apps[0];
        let holder = scope.spawn(move || {
            let session = app.open_session().unwrap();
            session.begin().unwrap();
            tell.send(()).unwrap();
            let _ = released.recv();
        });
        told.recv().unwrap();
        let disposal = scope.spawn(|| db.dispose_all_report());
        sites[4].assert_connections(0);
        drop(release);
        holder.join().unwrap();
        assert_eq!(disposal.join().unwrap().unwrap().closed, 2);
    });
}

/// A connection that comes from a program's own function which fails is no reason to wait.
#[test]
fn after_failed_connects() {
    fn refuse(_: &str) -> ConnectionResult<SqliteConnection> {
        Err(ConnectionError::BadConnection("no".into()))
    }
    let db = Database::<SqliteConnection>::without_migrations().connect_with(refuse);
    let app = db.init_app("refused", Config::new(":memory:")).unwrap();
    for _ in 0..3 {
        assert!(matches!(app.ping().unwrap_err(), Error::Connect { .. }));
    }
    let report = app.dispose_report().unwrap();
    assert_eq!((report.closed, report.is_complete()), (0, true));
}
