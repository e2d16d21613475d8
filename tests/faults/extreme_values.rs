//! Senseless configurations: each is a typed error, and none of them forges a line of the log.

use std::time::Duration;

use diesel::prelude::*;
use diesel_session::{App, Config, Database, Error, ErrorKind};

use crate::fixtures::{SessionExt, Steps, TestDatabase, logged, step};

const NEVER: Duration = Duration::MAX;
const NOW: Duration = Duration::ZERO;

/// Names that would begin a line of their own, colour a terminal or turn the text round.
const FORGED: &[&str] =
    &["a\nERROR forged", "a\r\nb", "\u{1b}[31mred", "a\0b", "a\u{2028}b", "a\u{202e}b", "a\u{7}b", "a\u{85}b"];

#[track_caller]
fn is_one_line(text: &str) {
    let seen = |c: char| !c.is_control() && !matches!(c, '\u{2028}' | '\u{2029}' | '\u{202e}');
    assert!(text.chars().all(seen) && text.len() < 1000, "{text:?}");
}

#[track_caller]
fn is_invalid<T>(outcome: Result<T, Error>, what: &str) {
    let Err(error) = outcome else { panic!("{what} was taken") };
    assert!(error.kind() == ErrorKind::InvalidConfig, "{what}: {error}");
    is_one_line(&error.to_string());
}

#[test]
fn extreme_options_are_invalid_config() {
    let config = || Config::new(":memory:");
    let cases = [
        ("max_size 0", config().max_size(0)),
        ("max_size beyond the limit", config().max_size(10_001)),
        ("max_size at its end", config().max_size(u32::MAX)),
        ("acquire_timeout zero", config().acquire_timeout(NOW)),
        ("acquire_timeout endless", config().acquire_timeout(NEVER)),
        ("connect_timeout zero", config().connect_timeout(NOW)),
        ("connect_timeout endless", config().connect_timeout(NEVER)),
        ("idle_timeout zero", config().idle_timeout(NOW)),
        ("idle_timeout endless", config().idle_timeout(NEVER)),
        ("max_lifetime zero", config().max_lifetime(NOW)),
        ("max_lifetime endless", config().max_lifetime(NEVER)),
        ("statement_timeout zero", config().statement_timeout(NOW)),
        ("statement_timeout endless", config().statement_timeout(NEVER)),
        ("lock_timeout zero", config().lock_timeout(NOW)),
        ("lock_timeout endless", config().lock_timeout(NEVER)),
        ("application_name of two lines", config().application_name("a\nb")),
        ("application_name with a NUL", config().application_name("a\0b")),
        ("connection_init_sql with a NUL", config().connection_init_sql("SELECT\0 1")),
        ("no URL", Config::new("")),
        ("a URL without a value", Config::new("host")),
    ];
    let db = Database::<SqliteConnection>::without_migrations();
    let postgres = Database::<PgConnection>::without_migrations();
    for (what, config) in cases {
        assert!(format!("{config:?}").len() < 1000);
        // A path may have any name.
        if what == "a URL without a value" {
            is_invalid(postgres.init_app("app", config), what);
        } else {
            is_invalid(db.init_app("app", config), what);
        }
    }
    is_invalid(
        Database::<SqliteConnection>::without_migrations().max_connections(0).init_app("app", config()),
        "no room",
    );
    assert!(db.status().is_empty());
    // The ends of what is taken.
    let year = Duration::from_secs(366 * 24 * 3600);
    let tiny = Duration::from_nanos(1);
    let most =
        config().max_size(10_000).acquire_timeout(year).connect_timeout(year).idle_timeout(year).max_lifetime(year);
    db.init_app("most", most.statement_timeout(year).lock_timeout(year)).unwrap().ping().unwrap();
    let least = config().max_size(1).idle_timeout(tiny).max_lifetime(tiny).statement_timeout(tiny).lock_timeout(tiny);
    db.init_app("least", least).unwrap().ping().unwrap();
    db.dispose_all().unwrap();
    // A connect that takes longer than that, however fast the machine is.
    let slow = Database::<SqliteConnection>::without_migrations().connect_with(|url| {
        std::thread::sleep(Duration::from_millis(50));
        SqliteConnection::establish(url)
    });
    let hasty = slow.init_app("hasty", config().acquire_timeout(tiny)).unwrap();
    assert!(hasty.ping().unwrap_err().is_timeout());
    slow.dispose_all().unwrap();
    let wide = Database::<SqliteConnection>::without_migrations().max_connections(usize::MAX);
    wide.init_app("wide", config()).unwrap().ping().unwrap();
}

#[test]
fn extreme_times_of_scopes_and_disposals_are_kept() {
    let db = Database::<SqliteConnection>::without_migrations();
    let app = db.init_app("app", Config::new(":memory:")).unwrap();
    let one = || db.session()?.number("SELECT 1 AS number");
    assert_eq!(app.scope().deadline(NEVER).run(one).unwrap(), 1);
    assert!(app.scope().deadline(NOW).run(one).unwrap_err().is_timeout());
    app.dispose_within(NEVER).unwrap();
    assert_eq!(app.scope().run(one).unwrap(), 1);
    app.dispose_within(NOW).unwrap();
}

#[test]
fn extreme_app_ids_are_invalid_config() {
    let db = Database::<SqliteConnection>::without_migrations();
    let long = "x".repeat(10_000);
    for id in FORGED.iter().copied().chain(["", &long, "\n", "\t"]) {
        is_invalid(db.init_app(id, Config::new(":memory:")), id);
        for error in [db.app(id).unwrap_err(), db.remove_app(id).unwrap_err()] {
            assert!(error.kind() == ErrorKind::UnknownApp, "{error}");
            is_one_line(&error.to_string());
        }
        let variable = Config::from_env(id).unwrap_err();
        is_one_line(&variable.to_string());
    }
    let longest = "x".repeat(200);
    db.init_app(longest.as_str(), Config::new(":memory:")).unwrap().ping().unwrap();
    let taken = db.init_app(longest, Config::new(":memory:")).unwrap_err();
    assert!(taken.kind() == ErrorKind::AlreadyRegistered);
}

#[test]
fn control_characters_in_names_forge_no_log_line() {
    logged::listen();
    let test_db = TestDatabase::sqlite();
    for forged in FORGED.iter().copied().filter(|name| !name.contains('\0')) {
        let steps =
            Steps(vec![step("1", "CREATE TABLE one (a INTEGER)", "DROP TABLE one"), step(forged, "SELEC", "SELEC")]);
        let db = Database::<SqliteConnection, _>::new(steps);
        let app = db.init_app("app", test_db.config().max_size(1)).unwrap();
        is_one_line(&app.create_all().unwrap_err().to_string());
        // A migration that succeeds is logged with its version.
        let fine = TestDatabase::sqlite();
        let steps = Steps(vec![step(forged, "CREATE TABLE one (a INTEGER)", "DROP TABLE one")]);
        let done = Database::<SqliteConnection, _>::new(steps);
        let done_app = done.init_app("app", fine.config()).unwrap();
        done_app.create_all().unwrap();
        done_app.drop_all().unwrap();
        done.dispose_all().unwrap();
        // The panic of a hook of the pool is logged with its message.
        fn panics(_: &App<SqliteConnection>, _: &mut SqliteConnection) {
            panic!("closing\n[ERROR] forged");
        }
        let closing = Database::<SqliteConnection>::without_migrations().on_close(panics);
        closing.init_app("app", Config::new(":memory:")).unwrap().ping().unwrap();
        closing.dispose_all().unwrap();
        // The name of a thread is in every list of holders.
        std::thread::scope(|scope| {
            let holder = std::thread::Builder::new().name(forged.into());
            let app = &app;
            let held = holder
                .spawn_scoped(scope, move || {
                    let session = app.open_session().unwrap();
                    session.begin().unwrap();
                    is_one_line(&app.status().to_string());
                    is_one_line(&app.ping().unwrap_err().to_string());
                    session.after_rollback(move || std::panic::panic_any(forged.to_owned())).unwrap();
                    is_one_line(&session.rollback().unwrap_err().to_string());
                })
                .unwrap();
            held.join().unwrap();
        });
        db.dispose_all().unwrap();
    }
    let lines = logged::lines();
    for told in ["hook panicked", "create_all is done", "drop_all is done", "hook `on_close` panicked"] {
        assert!(lines.iter().any(|line| line.contains(told)), "{told} was logged");
    }
    lines.iter().for_each(|line| is_one_line(line));
}

/// The processor time that this process has used.
fn processor_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("/proc is mounted");
    let fields: Vec<&str> = stat.rsplit(')').next().expect("a name").split_whitespace().collect();
    let ticks: u64 = fields[11..13].iter().map(|ticks| ticks.parse::<u64>().expect("a number")).sum();
    Duration::from_millis(ticks * 10)
}

#[test]
fn tiny_timeouts_keep_no_processor_busy() {
    logged::listen();
    let tiny = Duration::from_nanos(1);
    let config = || Config::new(":memory:");
    let cases = [
        ("leak_threshold", config().leak_threshold(tiny)),
        ("idle_timeout", config().idle_timeout(tiny)),
        ("max_lifetime", config().max_lifetime(tiny)),
        ("lock_timeout", config().lock_timeout(tiny)),
        ("connect_timeout", config().connect_timeout(tiny)),
        ("all", config().leak_threshold(tiny).idle_timeout(tiny).max_lifetime(tiny).lock_timeout(tiny)),
    ];
    for (what, config) in cases {
        let db = Database::<SqliteConnection>::without_migrations();
        let app = db.init_app("app", config).unwrap();
        // One connection is held, and another has been given back.
        let session = app.open_session().unwrap();
        if let Err(error) = session.begin() {
            assert!(error.is_timeout(), "{what}: {error}");
        }
        let _ = app.ping();
        let before = processor_time();
        // The time in which the processor time is measured.
        std::thread::sleep(Duration::from_secs(1));
        let used = processor_time() - before;
        assert!(used < Duration::from_millis(300), "{what}: {used:?} in a second");
        drop(session);
        db.dispose_all().unwrap();
    }
}
