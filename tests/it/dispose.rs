//! `dispose`, `dispose_all` and `remove_app`.

use std::panic::Location;
use std::sync::mpsc::{self, Sender};
use std::thread::{self, ScopedJoinHandle};
use std::time::Duration;

use diesel::prelude::*;
use diesel::result::ConnectionResult;
use diesel_session::pool::{AppEnd, DisposeReport};
use diesel_session::{App, Config, Database, Error, ErrorKind};

use crate::fixtures::threads::together;
use crate::fixtures::{COUNT, INSERT, SessionExt, TestConnection, TestDatabase, many_connections, shown};
use crate::for_each_database;
use crate::support::proxy::{Mode, Proxy};
use crate::support::{mariadb, postgres, wait};

for_each_database!(every_database =>
    dispose_waits_for_held_connections,
    dispose_names_a_held_connection,
    dispose_reports_the_callers_own_connection,
    dispose_may_be_called_repeatedly_from_many_threads,
    dispose_refuses_waiters,
    disposed_application_connects_again,
    handles_of_a_removed_application_return_disposed,
);
for_each_database!(every_server => dispose_during_a_connect_closes_the_connection);
for_each_database!(only mariadb => disposed_application_allows_drop_database_at_once_on_mariadb);
for_each_database!(only postgres =>
    dispose_counts_a_connect_that_does_not_return,
    disposed_application_allows_drop_database_at_once_on_postgres,
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

fn dispose_waits_for_held_connections<C: TestConnection>(test_db: &TestDatabase) {
    let _many = many_connections();
    let (idle, held) = (8, 4);
    let app = C::app(test_db.config().max_size(12));
    // SQLite keeps the handles of closed connections as long as others have the file locked.
    let assert_open = |wanted| match test_db {
        TestDatabase::Sqlite(_) => {}
        _ => test_db.assert_connections(wanted),
    };
    thread::scope(|scope| {
        let readers: Vec<_> =
            (0..idle + held).map(|number| hold_reading(scope, &app, &format!("reader-{number}"))).collect();
        assert_eq!(app.status().in_use, idle + held);
        let mut readers = readers.into_iter();
        readers.by_ref().take(idle).for_each(Held::release);
        assert_eq!((app.status().idle, app.status().in_use), (idle, held));
        test_db.assert_connections(idle + held);

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
    test_db.assert_connections(0);
}

/// Returns when it holds a connection that reads, of which SQLite too has many.
fn hold_reading<'s, C: TestConnection>(scope: &'s thread::Scope<'s, '_>, app: &App<C>, name: &str) -> Held<'s> {
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

fn dispose_names_a_held_connection<C: TestConnection>(test_db: &TestDatabase) {
    let app = C::app(test_db.config());
    thread::scope(|scope| {
        let held = hold_reading(scope, &app, "the-sleeper");
        let error = app.dispose_within(Duration::from_millis(50)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::StillInUse, "{error}");
        let report = error.dispose_report().expect("a report");
        assert_eq!(report.still_out.len(), 1);
        assert_eq!(report.still_out[0].thread_name(), "the-sleeper");
        assert!(!report.is_complete() && error.is_timeout());
        let text = error.to_string();
        assert!(text.contains(&shown(held.place)) && text.contains("the-sleeper"), "{text}");
        test_db.assert_connections(1);
        held.release();
        test_db.assert_connections(0);
        // Nothing is left of it for the next disposal.
        let report = app.dispose_report().unwrap();
        assert!(report.is_complete() && report.closed == 0, "{report}");
    });
}

fn dispose_reports_the_callers_own_connection<C: TestConnection>(test_db: &TestDatabase) {
    let app = C::app(test_db.config());
    app.create_all().unwrap();
    app.enter(|| {
        let session = C::db().session().unwrap();
        let place = here(|| session.send(INSERT).unwrap());
        let report = app.dispose_report().unwrap();
        assert_eq!((report.still_out.len(), report.closed), (1, 0), "{report}");
        assert!(report.to_string().contains(&shown(place)), "{report}");
        assert!(!report.is_complete());
        // It goes on until it ends, and is closed then.
        assert_eq!(session.number(COUNT).unwrap(), 1);
        session.commit().unwrap();
        test_db.assert_connections(0);
        assert_eq!(session.number(COUNT).unwrap(), 1, "committed, and seen through a fresh pool");
    });
    assert_eq!(app.dispose_report().unwrap().closed, 1);
    test_db.assert_connections(0);
}

fn dispose_may_be_called_repeatedly_from_many_threads<C: TestConnection>(test_db: &TestDatabase) {
    let app = C::app(test_db.config().max_size(3).idle_timeout(Duration::from_millis(1)));
    for _ in 0..40 {
        let sessions: Vec<_> = (0..3).map(|_| app.open_session().unwrap()).collect();
        app.scope().read_only().run(|| C::db().session()?.begin()).unwrap();
        drop(sessions);
        let reports = together(4, |_| app.dispose_report().unwrap());
        assert!(reports.iter().all(DisposeReport::is_complete), "{reports:?}");
        assert_eq!((app.status().open, app.status().holders.len()), (0, 0));
    }
    assert_eq!(app.dispose_report().unwrap().closed, 0);
    test_db.assert_connections(0);
}

fn dispose_refuses_waiters<C: TestConnection>(test_db: &TestDatabase) {
    let app = C::app(test_db.config().max_size(1).acquire_timeout(Duration::from_secs(30)));
    thread::scope(|scope| {
        let held = hold_reading(scope, &app, "holder");
        let waiters: Vec<_> = (0..5).map(|_| scope.spawn(|| app.ping())).collect();
        assert!(wait::until(Duration::from_secs(5), || app.status().waiting == 5));
        let disposal = scope.spawn(|| app.dispose_report());
        for waiter in waiters {
            let error = waiter.join().unwrap().unwrap_err();
            assert!(
                error.kind() == ErrorKind::Disposed
                    && error.app_end() == Some(AppEnd::Disposed)
                    && error.app().expect("an application") == app.id(),
                "{error}"
            );
        }
        held.release();
        assert_eq!(disposal.join().unwrap().unwrap().closed, 1);
    });
    test_db.assert_connections(0);
    app.ping().unwrap();
}

fn disposed_application_connects_again<C: TestConnection>(test_db: &TestDatabase) {
    let app = C::app(test_db.config());
    app.create_all().unwrap();
    for round in 1..=3 {
        app.run(|| C::db().session()?.send(INSERT)).unwrap();
        assert_eq!(app.status().open, 1);
        assert_eq!(app.dispose_report().unwrap().closed, 1);
        assert_eq!((app.status().open, app.status().idle), (0, 0));
        test_db.assert_connections(0);
        assert_eq!(app.open_session().unwrap().number(COUNT).unwrap(), round);
    }
    assert!(C::db().app(app.id()).is_ok(), "it stays registered");
}

fn handles_of_a_removed_application_return_disposed<C: TestConnection>(test_db: &TestDatabase) {
    let db = C::db();
    let app = C::app(test_db.config());
    let session = app.open_session().unwrap();
    app.ping().unwrap();
    assert_eq!(db.remove_app(app.id()).unwrap().closed, 1);
    test_db.assert_connections(0);
    let disposed = |error: Error| {
        assert!(error.kind() == ErrorKind::Disposed && error.app_end() == Some(AppEnd::Removed), "{error}")
    };
    disposed(app.ping().unwrap_err());
    disposed(app.create_all().unwrap_err());
    disposed(app.migrations().unwrap_err());
    disposed(app.open_session().unwrap_err());
    disposed(session.begin().unwrap_err());
    disposed(app.context(|| db.session()).unwrap_err());
    assert!(db.app(app.id()).unwrap_err().kind() == ErrorKind::UnknownApp);
    assert!(db.remove_app(app.id()).unwrap_err().kind() == ErrorKind::UnknownApp);
    assert_eq!(app.dispose_report().unwrap().closed, 0);
    // The id is free, and the new application has nothing to do with the old handle.
    let again = db.init_app(app.id(), test_db.config()).unwrap();
    again.ping().unwrap();
    disposed(app.ping().unwrap_err());
    db.remove_app(again.id()).unwrap();
    test_db.assert_connections(0);
}

fn dispose_during_a_connect_closes_the_connection<C: TestConnection>(test_db: &TestDatabase) {
    let proxy = Proxy::to(("127.0.0.1", test_db.port()));
    proxy.set(Mode::Delay(Duration::from_millis(300)));
    let app = C::app(Config::new(test_db.url_at(proxy.port())));
    thread::scope(|scope| {
        let caller = scope.spawn(|| app.ping());
        assert!(wait::until(Duration::from_secs(5), || app.status().connecting == 1));
        let report = app.dispose_report().unwrap();
        assert!(report.is_complete(), "{report}");
        let error = caller.join().unwrap().unwrap_err();
        assert!(error.is_disposed(), "{error}");
    });
    test_db.assert_connections(0);
    proxy.set(Mode::Pass);
    app.ping().unwrap();
}

/// A connect that takes longer than the disposal waits.
fn dispose_counts_a_connect_that_does_not_return() {
    let test_db = TestDatabase::postgres();
    let proxy = Proxy::to(("127.0.0.1", test_db.port()));
    proxy.set(Mode::Silent);
    let app = PgConnection::app(Config::new(test_db.url_at(proxy.port())));
    thread::scope(|scope| {
        let caller = scope.spawn(|| app.ping());
        // Under way, and not only ordered.
        assert!(wait::until(Duration::from_secs(5), || proxy.accepted() == 1));
        let error = app.dispose_within(Duration::from_millis(50)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::StillInUse, "{error}");
        let report = error.dispose_report().expect("a report");
        assert_eq!(report.connecting, 1, "{report}");
        proxy.set(Mode::Pass);
        assert!(caller.join().unwrap().unwrap_err().is_disposed());
        assert!(app.dispose_report().unwrap().is_complete());
    });
    test_db.assert_connections(0);
}

fn the_database_can_be_dropped_at_once<C: TestConnection>(
    create: impl Fn() -> crate::support::Database,
    drop: impl Fn(&str),
) {
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

fn disposed_application_allows_drop_database_at_once_on_postgres() {
    let admin = std::cell::RefCell::new(postgres().admin());
    the_database_can_be_dropped_at_once::<PgConnection>(
        || postgres().create_database(),
        |name| {
            diesel::sql_query(format!("DROP DATABASE {name}")).execute(&mut *admin.borrow_mut()).unwrap();
        },
    );
}

fn disposed_application_allows_drop_database_at_once_on_mariadb() {
    let admin = std::cell::RefCell::new(mariadb().admin());
    the_database_can_be_dropped_at_once::<MysqlConnection>(
        || mariadb().create_database(),
        |name| {
            diesel::sql_query(format!("DROP DATABASE {name}")).execute(&mut *admin.borrow_mut()).unwrap();
        },
    );
}

/// SQLite in memory: one database for all connections of the application, until it is disposed of.
#[test]
fn in_memory_database_lives_until_the_disposal() {
    fn check<C: TestConnection>() {
        let app = C::app(Config::new(":memory:").max_size(4).idle_timeout(Duration::from_millis(2)));
        let other = C::app(Config::new(":memory:"));
        assert_eq!(app.create_all().unwrap().len(), 1);
        app.run(|| C::db().session()?.send(INSERT)).unwrap();
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
    check::<crate::fixtures::AnyConnection>();
}

#[test]
fn dispose_all_disposes_of_every_application() {
    let db: Database<SqliteConnection> = Database::without_migrations();
    let test_dbs: Vec<_> = (0..5).map(|_| TestDatabase::sqlite()).collect();
    let ids = ["a", "b", "c", "d", "e"];
    let apps: Vec<_> =
        ids.into_iter().zip(&test_dbs).map(|(id, test_db)| db.init_app(id, test_db.config()).unwrap()).collect();
    apps[..4].iter().for_each(|app| app.ping().unwrap());
    let report = db.dispose_all_report().unwrap();
    assert_eq!((report.closed, report.apps.len()), (4, 5));
    test_dbs.iter().for_each(|test_db| test_db.assert_connections(0));
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
        test_dbs[4].assert_connections(0);
        drop(release);
        holder.join().unwrap();
        assert_eq!(disposal.join().unwrap().unwrap().closed, 2);
    });
}

/// A connection that comes from a program's own function which fails is no reason to wait.
#[test]
fn dispose_after_failed_connects_is_complete() {
    fn refuse(_: &str) -> ConnectionResult<SqliteConnection> {
        Err(ConnectionError::BadConnection("no".into()))
    }
    let db = Database::<SqliteConnection>::without_migrations().connect_with(refuse);
    let app = db.init_app("refused", Config::new(":memory:")).unwrap();
    for _ in 0..3 {
        assert!(app.ping().unwrap_err().kind() == ErrorKind::Connect);
    }
    let report = app.dispose_report().unwrap();
    assert_eq!((report.closed, report.is_complete()), (0, true));
}
