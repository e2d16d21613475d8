//! Errors of `init_app` and of the first connect. `tests/faults/connect.rs` measures their time.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use diesel::prelude::*;
use diesel::result::ConnectionResult;
use diesel_session::pool::ConnectErrorKind;
use diesel_session::{App, Config, Database, Error, ErrorKind};

use crate::fixtures::{AnyConnection, COUNT, INSERT, SessionExt, TestConnection, TestDatabase, unique};
use crate::for_each_database;
use crate::support::{PASSWORD, TempSqlite};

for_each_database!(every_database =>
    session_opens_no_connection_before_the_first_statement,
    on_connect_statements_run_on_the_first_connection,
);
for_each_database!(every_server => refused_connects_have_an_error_kind, unused_applications_open_no_connection);

const SECRET: &str = "hunter2hunter2";

/// Every form in which an error can be seen.
#[track_caller]
fn assert_tells<C: TestConnection>(app: &App<C>, error: &Error, secrets: &[&str]) {
    let texts = [
        error.to_string(),
        format!("{error:?}"),
        format!("{:?}", std::error::Error::source(error)),
        format!("{app:?} {:?} {}", app.status(), app.status()),
    ];
    assert!(texts[0].contains(&format!("`{}`", app.id())), "{error}");
    assert!(!texts[0].contains(['\n', '\t']), "{error}");
    assert!(!["  ", "?.", "!.", ".. "].iter().any(|double| texts[0].contains(double)), "{error}");
    for text in texts {
        for secret in secrets.iter().chain(&[PASSWORD, "s3cret%2Fpw%401", SECRET]) {
            assert!(!text.contains(secret), "{text}");
        }
    }
}

fn session_opens_no_connection_before_the_first_statement<C: TestConnection>(test_db: &TestDatabase) {
    let app = C::app(test_db.config());
    app.enter(|| {
        let session = C::db().session().unwrap();
        session.commit().unwrap();
        session.remove().unwrap();
        assert_eq!((app.status().open, test_db.connections()), (0, 0));
    });
    drop(app.open_session().unwrap());
    assert_eq!(app.dispose_report().unwrap().closed, 0);
    assert_eq!(test_db.connections(), 0);
    if let TestDatabase::Sqlite(file) = test_db {
        assert!(!file.path().exists());
    }
    app.ping().unwrap();
    assert_eq!((app.status().open, app.status().idle), (1, 1));
}

fn on_connect_statements_run_on_the_first_connection<C: TestConnection>(test_db: &TestDatabase) {
    let app = C::app(
        test_db
            .config()
            .connection_init_sql("CREATE TEMPORARY TABLE mine (id INTEGER)")
            .connection_init_sql("INSERT INTO mine VALUES (1)"),
    );
    let session = app.open_session().unwrap();
    assert_eq!(session.number("SELECT count(*) AS number FROM mine").unwrap(), 1);
    drop(session);
    let broken = C::app(test_db.config().connection_init_sql("SELECT * FROM nowhere_at_all"));
    let error = broken.ping().unwrap_err();
    assert!(error.kind() == ErrorKind::Connect && error.to_string().contains("nowhere_at_all"), "{error}");
    assert_tells(&broken, &error, &[]);
    assert_eq!((broken.status().open, broken.status().in_use), (0, 0));
}

fn refused_connects_have_an_error_kind<C: TestConnection>(test_db: &TestDatabase) {
    let (scheme, rest) =
        test_db.url().split_once("://").map(|(scheme, rest)| (scheme.to_owned(), rest.to_owned())).unwrap();
    let (_, place) = rest.split_once('@').unwrap();
    let (address, _) = place.split_once('/').unwrap();
    let user = rest.split_once('@').unwrap().0;
    let cases = [
        (format!("{scheme}://app:{SECRET}@{place}"), ConnectErrorKind::Authentication),
        (format!("{scheme}://nobody_at_all:{SECRET}@{place}"), ConnectErrorKind::Authentication),
        (format!("{scheme}://{user}@{address}/app_nowhere"), ConnectErrorKind::UnknownDatabase),
        (format!("{scheme}://{user}@127.0.0.1:1/app"), ConnectErrorKind::Unreachable),
        (format!("{scheme}://{user}@no-such-host.invalid/app"), ConnectErrorKind::Unreachable),
    ];
    for (url, expected) in cases {
        let app = C::app(Config::new(url));
        for _ in 0..2 {
            let error = app.ping().unwrap_err();
            assert!(
                error.kind() == ErrorKind::Connect && error.connect_error_kind().expect("a kind") == expected,
                "{expected:?}: {error}"
            );
            assert_tells(&app, &error, &[]);
        }
        let error = app.create_all().unwrap_err();
        assert!(error.kind() == ErrorKind::Connect, "{error}");
        let error = app.context(|| C::db().session()?.number(COUNT)).unwrap_err();
        assert!(error.kind() == ErrorKind::Connect, "{error}");
        assert_eq!((app.status().open, app.status().in_use, app.status().waiting), (0, 0, 0));
        assert!(app.dispose_report().unwrap().is_complete());
    }
}

fn unused_applications_open_no_connection<C: TestConnection>(test_db: &TestDatabase) {
    let apps: Vec<_> = (0..100).map(|_| C::app(test_db.config())).collect();
    assert_eq!(test_db.connections(), 0);
    apps[7].create_all().unwrap();
    apps[7].run(|| C::db().session()?.send(INSERT)).unwrap();
    assert_eq!(apps[8].open_session().unwrap().number(COUNT).unwrap(), 1);
    assert_eq!(test_db.connections(), 2);
    drop(apps);
    test_db.assert_connections(0);
}

#[test]
fn malformed_urls_are_refused_at_once() {
    fn check<C: TestConnection>(urls: &[&str]) {
        for url in urls {
            let id = unique("malformed");
            let config = Config::new(*url);
            assert!(!format!("{config:?}").contains(SECRET), "{config:?}");
            let error = C::db().init_app(&id, config).map(drop).unwrap_err();
            assert!(error.kind() == ErrorKind::InvalidConfig && error.app().expect("an application") == id, "{error}");
            for text in [error.to_string(), format!("{error:?}")] {
                assert!(!text.contains(SECRET), "{text}");
            }
            assert!(C::db().app(&id).is_err(), "it is not registered");
        }
    }
    let postgres = [
        "",
        "postgres://app:hunter2hunter2@host:port/db",
        "postgres://app:hunter2hunter2@host:99999/db",
        "postgres://app:hunter2hunter2%zz@host/db",
        "postgres://app:hunter2hunter2/a@host/db",
        "postgres://app:hunter2hunter2@b@host/db",
        "postgres://app:hunter2hunter2@host/db?sslmode",
        "postgres://app:hunter2hunter2@host/d b",
        "host=localhost password=hunter2hunter2 nonsense",
        "host=localhost password='hunter2hunter2",
        "mysql://app:hunter2hunter2@host/db",
    ];
    check::<PgConnection>(&postgres);
    let mysql = [
        "",
        "mysql://app:hunter2hunter2@host:port/db",
        "mysql://app:hunter2hunter2%@host/db",
        "mysql://app:hunter2hunter2#@host/db",
        "mysql://app:hunter2hunter2@host/db/more",
        "mariadb://app:hunter2hunter2@host/db",
        "postgres://app:hunter2hunter2@host/db",
    ];
    check::<MysqlConnection>(&mysql);
    check::<SqliteConnection>(&["", "postgres://app:hunter2hunter2@host/db", "mysql://app:hunter2hunter2@host/db"]);
    check::<AnyConnection>(&[
        "",
        "app:hunter2hunter2@host/db",
        "oracle://app:hunter2hunter2@host/db",
        postgres[1],
        mysql[1],
    ]);
}

#[test]
fn sqlite_files_that_cannot_be_opened_are_unreachable() {
    let folder = TempSqlite::new();
    for (path, why) in [
        (folder.path().with_file_name("missing").join("file.sqlite"), "a missing folder"),
        (folder.path().parent().unwrap().to_owned(), "a folder"),
    ] {
        let app = SqliteConnection::app(Config::new(path.to_str().unwrap()));
        let error = app.ping().unwrap_err();
        assert!(
            error.kind() == ErrorKind::Connect && error.connect_error_kind() == Some(ConnectErrorKind::Unreachable),
            "{why}: {error}"
        );
        assert_tells(&app, &error, &[]);
        // It will not be there by itself.
        assert!(!error.is_transient(), "{why}: {error}");
        let folder = path.parent().unwrap().display().to_string();
        let cause = if path.is_dir() {
            "it is a folder, not a file".into()
        } else {
            format!("the folder {folder} does not exist")
        };
        assert!(error.to_string().contains(&cause), "{why}: {error}");
    }
    let missing = folder.path().with_file_name("missing.sqlite").display().to_string();
    for mode in ["ro", "rw"] {
        let app = SqliteConnection::app(Config::new(format!("file:{missing}?mode={mode}")));
        let error = app.ping().unwrap_err();
        assert!(error.to_string().contains("there is no such file in the folder"), "{error}");
        assert!(!error.is_transient(), "{error}");
    }
    std::fs::write(folder.path(), "this is not a database, it is a text of more than a hundred bytes. ".repeat(20))
        .unwrap();
    let app = SqliteConnection::app(Config::new(folder.url()));
    let error = app.ping().unwrap_err();
    assert!(error.kind() == ErrorKind::Connect && error.to_string().contains("not a database"), "{error}");
}

/// The text of a program's own function is not taken for the driver's.
#[test]
fn error_of_connect_with_is_no_driver_error() {
    fn refuse(_: &str) -> ConnectionResult<SqliteConnection> {
        Err(ConnectionError::BadConnection("built without that database,\n\tsorry.".into()))
    }
    let db = Database::<SqliteConnection>::without_migrations().connect_with(refuse);
    let app = db.init_app("refused", Config::new(":memory:")).unwrap();
    let error = app.ping().unwrap_err();
    assert!(
        error.kind() == ErrorKind::Connect && error.connect_error_kind() == Some(ConnectErrorKind::Other),
        "{error}"
    );
    assert!(error.to_string().ends_with("): built without that database, sorry."), "{error}");
    assert_tells(&app, &error, &[]);
}

#[test]
fn sqlite_connections_have_foreign_keys_busy_timeout_and_wal() {
    let test_db = TestDatabase::sqlite();
    let app = SqliteConnection::app(test_db.config().lock_timeout(Duration::from_millis(1234)));
    app.ping().unwrap();
    let session = app.open_session().unwrap();
    assert_eq!(session.number("SELECT foreign_keys AS number FROM pragma_foreign_keys").unwrap(), 1);
    assert_eq!(session.number("SELECT timeout AS number FROM pragma_busy_timeout").unwrap(), 1234);
    assert_eq!(session.number("SELECT journal_mode = 'wal' AS number FROM pragma_journal_mode").unwrap(), 1);
    let plain = TestDatabase::sqlite();
    let without = SqliteConnection::app(plain.config().wal(false));
    let session = without.open_session().unwrap();
    assert_eq!(session.number("SELECT journal_mode = 'delete' AS number FROM pragma_journal_mode").unwrap(), 1);
    assert_eq!(session.number("SELECT timeout AS number FROM pragma_busy_timeout").unwrap(), 5000);
    session
        .send(
            "CREATE TABLE parents (id INTEGER PRIMARY KEY); CREATE TABLE children (parent INTEGER REFERENCES parents)",
        )
        .unwrap();
    let orphan = session.send("INSERT INTO children VALUES (7)").unwrap_err();
    assert!(orphan.is_foreign_key_violation(), "{orphan:#}");
}

/// A server that is full for a moment: refusals for a reason that passes are waited out, others end the call.
#[test]
fn transient_refusals_are_retried() {
    static CALLS: AtomicUsize = AtomicUsize::new(0);
    fn full_at_first(url: &str) -> ConnectionResult<SqliteConnection> {
        match CALLS.fetch_add(1, Ordering::Relaxed) {
            0..5 => Err(ConnectionError::BadConnection("database is locked".into())),
            5 => SqliteConnection::establish(url),
            _ => panic!("the driver fell over with {SECRET}"),
        }
    }
    let db = Database::<SqliteConnection>::without_migrations().connect_with(full_at_first);
    let file = TempSqlite::new();
    let app = db.init_app("full", Config::new(file.url()).max_size(2)).unwrap();
    let session = app.open_session().unwrap();
    session.begin().unwrap();
    assert_eq!(CALLS.load(Ordering::Relaxed), 6);
    let error = app.ping().unwrap_err();
    assert!(
        error.kind() == ErrorKind::Connect && error.to_string().contains("panicked: the driver fell over"),
        "{error}"
    );
    assert_eq!(CALLS.load(Ordering::Relaxed), 7, "a panic is not tried again");
    session.commit().unwrap();
    app.ping().unwrap();
    app.dispose().unwrap();
}

/// Each form of a URL that opens a file opens that file, also for plain Diesel, and no other.
#[test]
fn sqlite_url_with_parameters_opens_its_file() {
    let folder = tempfile::Builder::new().prefix("mode=memory").tempdir().unwrap();
    let path = folder.path().join("a b.sqlite");
    let (plain, coded) = (path.display().to_string(), path.display().to_string().replace(' ', "%20"));
    let urls = [
        plain.clone(),
        format!("file:{plain}"),
        format!("file:{coded}"),
        format!("file://{coded}"),
        format!("file://localhost{coded}"),
        format!("file:{coded}?note=mode=memory"),
        format!("file:{coded}?cache=private#mode=memory"),
        format!("sqlite://{coded}"),
        format!("sqlite://{coded}?vfs=unix&note=vfs=memdb"),
    ];
    for (rows, url) in urls.iter().enumerate() {
        let app = SqliteConnection::app(Config::new(url));
        app.create_all().unwrap();
        app.run(|| SqliteConnection::db().session()?.send(INSERT)).unwrap();
        app.dispose().unwrap();
        for url in [&plain, url] {
            let mut diesel = SqliteConnection::establish(url).unwrap();
            assert_eq!(diesel.number(COUNT).unwrap(), rows as i64 + 1, "{url}");
        }
    }
    let entries = std::fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(entries, 1, "one file");
}

/// All connections of an application have one database in memory, which lives until the application is disposed of.
#[test]
fn sqlite_url_in_memory_is_one_database_until_the_disposal() {
    let mut urls: Vec<String> = [
        ":memory:",
        "sqlite::memory:",
        "sqlite://:memory:",
        "sqlite:///:memory:",
        "file::memory:",
        "file::memory:?cache=shared",
        "file:",
        "file:shop?mode=memory",
        "file:shop?cache=shared&mode=memory",
        "file:shop?vfs=memdb",
    ]
    .map(String::from)
    .to_vec();
    urls.push(format!("file:/{}?vfs=memdb", unique("shop")));
    for url in urls {
        let app = SqliteConnection::app(Config::new(&url).idle_timeout(Duration::from_millis(1)));
        app.create_all().unwrap();
        app.run(|| SqliteConnection::db().session()?.send(INSERT)).unwrap();
        let closed = || crate::support::wait::until(Duration::from_secs(5), || app.status().open == 0);
        assert!(closed(), "{url}: {}", app.status());
        let count = || app.context(|| SqliteConnection::db().session()?.number(COUNT));
        assert_eq!(count().unwrap(), 1, "{url}");
        // Two connections at a time.
        let read = || SqliteConnection::db().session()?.number(COUNT);
        let both = app.scope().read_only().run(|| Ok::<_, Error>((read()?, app.scope().read_only().run(read)?)));
        assert_eq!(both.unwrap(), (1, 1), "{url}");
        assert!(app.status().to_string().contains(":memory:"), "{url}");
        app.dispose().unwrap();
        count().unwrap_err();
    }
    // A name that begins with a slash is the whole process's, as for plain Diesel.
    let url = format!("file:/{}?vfs=memdb", unique("shared"));
    let (one, two) = (SqliteConnection::app(Config::new(&url)), SqliteConnection::app(Config::new(&url)));
    one.create_all().unwrap();
    one.run(|| SqliteConnection::db().session()?.send(INSERT)).unwrap();
    assert_eq!(two.context(|| SqliteConnection::db().session()?.number(COUNT)).unwrap(), 1);
    assert_eq!(SqliteConnection::establish(&url).unwrap().number(COUNT).unwrap(), 1);
}

#[test]
fn sqlite_file_that_is_opened_for_reading_is_read() {
    for wal in [false, true] {
        let test_db = TestDatabase::sqlite();
        let owner = SqliteConnection::app(test_db.config().wal(wal));
        owner.create_all().unwrap();
        owner.run(|| SqliteConnection::db().session()?.send(INSERT)).unwrap();
        owner.dispose().unwrap();
        for form in ["file:%?mode=ro", "file:%?immutable=1", "sqlite://%?mode=ro", "file:%?mode=ro&immutable=1"] {
            let app = SqliteConnection::app(Config::new(form.replace('%', &test_db.url())));
            let count = || SqliteConnection::db().session()?.number(COUNT);
            assert_eq!(app.context(count).unwrap(), 1, "{form}");
            assert_eq!(app.scope().read_only().run(count).unwrap(), 1, "{form}");
            assert_eq!(app.scope().autocommit().run(count).unwrap(), 1, "{form}");
            assert_eq!(app.migrations().unwrap().len(), 1, "{form}");
            let error = app.context(|| SqliteConnection::db().session()?.send(INSERT)).unwrap_err();
            assert!(format!("{error:#}").contains("readonly"), "{form}: {error}");
            app.dispose().unwrap();
        }
        assert_eq!(SqliteConnection::establish(&test_db.url()).unwrap().number(COUNT).unwrap(), 1);
    }
}
