//! The hooks of the pool: at a checkout, at a checkin, and before a connection is closed.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use diesel::prelude::*;
use diesel_session::pool::Reset;
use diesel_session::{App, Database, ErrorKind};

use crate::fixtures::{COUNT, INSERT, SessionExt, TestConnection, TestDatabase, unique};
use crate::for_each_database;
use crate::support::wait;

for_each_database!(every_database =>
    pool_hooks_run_in_order,
    on_checkin_is_skipped_for_a_closed_connection,
    on_checkout_failure_is_an_error_and_loses_no_permit,
    on_checkin_failure_closes_the_connection_only,
    on_close_panic_is_contained,
    statements_of_pool_hooks_do_not_affect_the_session,
    hooks_receive_the_application,
);
for_each_database!(every_server => on_checkout_failure_on_a_lost_connection_tries_another);

/// The hooks write down that they were called, in a table of the database under test.
fn log<C: TestConnection>(conn: &mut C, what: &str) -> QueryResult<()> {
    conn.batch_execute(&format!("INSERT INTO entries (author, message) VALUES ('{what}', 'hook')"))
}

fn connected<C: TestConnection>(_: &App<C>, conn: &mut C) -> QueryResult<()> {
    log(conn, "connect")
}

fn checked_out<C: TestConnection>(_: &App<C>, conn: &mut C) -> QueryResult<()> {
    log(conn, "checkout")
}

fn checked_in<C: TestConnection>(_: &App<C>, conn: &mut C) -> QueryResult<()> {
    log(conn, "checkin")
}

fn closing<C: TestConnection>(_: &App<C>, conn: &mut C) {
    // Of a connection that is lost it cannot be written down.
    let _ = log(conn, "close");
}

fn logging<C: TestConnection>() -> Database<C> {
    C::new_db()
        .on_connect(connected::<C>)
        .on_checkout(checked_out::<C>)
        .on_checkin(checked_in::<C>)
        .on_close(closing::<C>)
}

/// What has been written down since the last time.
fn taken<C: TestConnection>(observer: &App<C>) -> String {
    let session = observer.open_session().unwrap();
    let mut seen = Vec::new();
    // A number a word, as a number is what every connection type can be asked for.
    let first = "SELECT CAST(min(id) AS NUMBER) AS number FROM entries";
    let number = if session.with(|conn| Ok(conn.number(&first.replace("NUMBER", "BIGINT")))).unwrap().is_ok() {
        "BIGINT"
    } else {
        "SIGNED"
    };
    session.rollback().unwrap();
    while session.number(COUNT).unwrap() > 0 {
        let id = session.number(&first.replace("NUMBER", number)).unwrap();
        let is = |word: &str| {
            session
                .number(&format!("SELECT count(*) AS number FROM entries WHERE id = {id} AND author = '{word}'"))
                .unwrap()
                == 1
        };
        seen.push(["connect", "checkout", "checkin", "close"].into_iter().find(|word| is(word)).unwrap_or("?"));
        session.send(&format!("DELETE FROM entries WHERE id = {id}")).unwrap();
    }
    session.commit().unwrap();
    seen.join(" ")
}

fn observer<C: TestConnection>(test_db: &TestDatabase) -> crate::fixtures::RegisteredApp<C> {
    let app = C::app(test_db.config());
    app.create_all().unwrap();
    app
}

fn pool_hooks_run_in_order<C: TestConnection>(test_db: &TestDatabase) {
    let seen = observer::<C>(test_db);
    let db = logging::<C>();
    let app = db.init_app(unique("hooks"), test_db.config().max_size(2)).unwrap();
    app.enter(|| ());
    assert_eq!(taken(&seen), "");
    app.ping().unwrap();
    assert_eq!(taken(&seen), "connect checkout checkin");
    app.scope().read_only().run(|| db.session()?.begin()).unwrap();
    assert_eq!(taken(&seen), "checkout checkin");
    // A connection on which something was left, which is cleaned first, or closed.
    app.run(|| db.session()?.send("CREATE TEMPORARY TABLE left_over (a INTEGER)")).unwrap();
    let cleaned = matches!(test_db, TestDatabase::Postgres(_));
    assert_eq!(taken(&seen), if cleaned { "checkout connect checkin" } else { "checkout close" });
    app.ping().unwrap();
    assert_eq!(taken(&seen), if cleaned { "checkout checkin" } else { "connect checkout checkin" });
    let (one, two) = (app.open_session().unwrap(), app.open_session().unwrap());
    for session in [&one, &two] {
        session.with(|_| Ok(())).unwrap();
        session.rollback().unwrap();
    }
    taken(&seen);
    assert_eq!(app.dispose_report().unwrap().closed, 1);
    assert_eq!(taken(&seen), "close");
    // One that is out when it is disposed of is closed when it comes back.
    let session = app.open_session().unwrap();
    if matches!(test_db, TestDatabase::Sqlite(_)) {
        session.number(COUNT).unwrap();
    } else {
        session.begin().unwrap();
    }
    app.dispose().unwrap();
    session.rollback().unwrap();
    assert_eq!(taken(&seen), "connect checkout close");
}

fn on_checkin_is_skipped_for_a_closed_connection<C: TestConnection>(test_db: &TestDatabase) {
    let seen = observer::<C>(test_db);
    let db = logging::<C>();
    let app = db.init_app(unique("hooks"), test_db.config().max_size(1).reset(Reset::Never)).unwrap();
    app.run(|| db.session()?.send("CREATE TEMPORARY TABLE left_over (a INTEGER)")).unwrap();
    assert_eq!(taken(&seen), "connect checkout checkin");
    let session = app.open_session().unwrap();
    session.send("ROLLBACK").unwrap();
    session.rollback().unwrap();
    assert_eq!(taken(&seen), "checkout close");
    assert_eq!(app.status().open, 0);
}

/// In three ways; a panic costs the test time, so it is rare.
fn fails<C: TestConnection>(_: &App<C>, conn: &mut C) -> QueryResult<()> {
    static CALLS: AtomicUsize = AtomicUsize::new(0);
    match CALLS.fetch_add(1, Ordering::Relaxed) % 20 {
        0 => panic!("the hook panicked on purpose"),
        even if even % 2 == 0 => conn.batch_execute("BEGIN"),
        _ => conn.batch_execute("SELECT * FROM nowhere_at_all"),
    }
}

fn on_checkout_failure_is_an_error_and_loses_no_permit<C: TestConnection>(test_db: &TestDatabase) {
    let db = C::new_db().on_checkout(fails::<C>);
    let app = db.init_app(unique("hooks"), test_db.config().max_size(2)).unwrap();
    let mut texts = Vec::new();
    for _ in 0..100 {
        let error = app.context(|| db.session()?.number(COUNT)).unwrap_err();
        assert!(
            error.kind() == ErrorKind::HookFailed
                && error.hook() == Some("on_checkout")
                && error.to_string().ends_with("No connection was given out."),
            "{error}"
        );
        assert_eq!((app.status().open, app.status().in_use), (0, 0));
        texts.push(error.to_string());
    }
    for part in ["it panicked: the hook panicked on purpose", "left a transaction open", "nowhere_at_all"] {
        assert!(
            texts.iter().any(|text| text.contains(part) && text.ends_with("No connection was given out.")),
            "{texts:?}"
        );
    }
    assert!(app.dispose_report().unwrap().is_complete());
}

fn on_checkin_failure_closes_the_connection_only<C: TestConnection>(test_db: &TestDatabase) {
    observer::<C>(test_db);
    let db = C::new_db().on_checkin(fails::<C>);
    let app = db.init_app(unique("hooks"), test_db.config().max_size(2)).unwrap();
    for number in 1..=100 {
        let count = app.run(|| {
            let session = db.session()?;
            session.send(INSERT)?;
            session.number(COUNT)
        });
        assert_eq!(count.unwrap(), number);
        assert_eq!((app.status().open, app.status().in_use), (0, 0));
    }
    // Two connections can be checked out at the same time.
    let begun = || {
        app.scope().read_only().run(|| {
            db.session()?.begin()?;
            app.scope().read_only().run(|| db.session()?.begin())
        })
    };
    begun().unwrap();
    assert!(app.dispose_report().unwrap().is_complete());
}

fn on_close_panic_is_contained<C: TestConnection>(test_db: &TestDatabase) {
    let db = C::new_db().on_close(|_, _| panic!("on purpose"));
    let app = db.init_app(unique("hooks"), test_db.config().max_size(2)).unwrap();
    for _ in 0..100 {
        app.ping().unwrap();
        assert_eq!(app.dispose_report().unwrap().closed, 1);
        assert_eq!((app.status().open, app.status().in_use), (0, 0));
    }
    test_db.assert_connections(0);
}

fn statements_of_pool_hooks_do_not_affect_the_session<C: TestConnection>(test_db: &TestDatabase) {
    observer::<C>(test_db);
    fn noisy<C: TestConnection>(_: &App<C>, conn: &mut C) -> QueryResult<()> {
        let _ = conn.batch_execute("SELECT * FROM nowhere_at_all");
        conn.transaction(|conn| conn.batch_execute("SELECT 1"))?;
        conn.batch_execute("CREATE TEMPORARY TABLE IF NOT EXISTS of_the_hook (a INTEGER)")?;
        // The library's own is put in its place again.
        conn.set_instrumentation(|_: diesel::connection::InstrumentationEvent<'_>| {});
        Ok(())
    }
    let db = C::new_db().on_checkout(noisy::<C>).on_checkin(noisy::<C>);
    let app = db.init_app(unique("hooks"), test_db.config().max_size(1)).unwrap();
    for number in 1..=3 {
        let count = app.run(|| {
            let session = db.session()?;
            session.send(INSERT)?;
            session.number(COUNT)
        });
        assert_eq!(count.unwrap(), number);
        // What the hook has left is the program's own, and closes nothing.
        assert_eq!(app.status().open, 1);
    }
    let ended = app.run(|| db.session()?.send("ROLLBACK; BEGIN"));
    assert!(ended.unwrap_err().is_rollback_required(), "the session still sees what is sent");
}

fn on_checkout_failure_on_a_lost_connection_tries_another<C: TestConnection>(test_db: &TestDatabase) {
    observer::<C>(test_db);
    let db = C::new_db().on_checkout(|_, conn| conn.batch_execute("SELECT 1"));
    let app = db.init_app(unique("hooks"), test_db.config()).unwrap();
    for _ in 0..5 {
        app.ping().unwrap();
        test_db.terminate_all();
        test_db.assert_connections(0);
        assert_eq!(app.context(|| db.session()?.number(COUNT)).unwrap(), 0);
    }
}

fn note_tenant<C: TestConnection>(app: &App<C>, conn: &mut C) -> QueryResult<()> {
    log(conn, &format!("of {}", app.id()))
}

fn note_tenant_at_close<C: TestConnection>(app: &App<C>, conn: &mut C) {
    let _ = log(conn, &format!("close {}", app.id()));
}

/// One hook serves many tenants.
fn hooks_receive_the_application<C: TestConnection>(test_db: &TestDatabase) {
    let seen = observer::<C>(test_db);
    let told = |what: &str| {
        let query = format!("SELECT count(*) AS number FROM entries WHERE author = '{what}'");
        seen.scope().autocommit().run(|| C::db().session()?.number(&query)).unwrap()
    };
    let db = C::new_db()
        .on_connect(note_tenant::<C>)
        .on_checkout(note_tenant::<C>)
        .on_checkin(note_tenant::<C>)
        .on_close(note_tenant_at_close::<C>);
    let ids = [unique("tenant"), unique("tenant")];
    for id in &ids {
        let app = db.init_app(id.as_str(), test_db.config().max_size(1)).unwrap();
        app.ping().unwrap();
        assert_eq!((told(&format!("of {id}")), told(&format!("close {id}"))), (3, 0));
    }
    db.app(&ids[0]).unwrap().checkout().unwrap().number(COUNT).unwrap();
    assert!(told(&format!("of {}", ids[0])) >= 5);
    db.remove_app(&ids[0]).unwrap();
    assert_eq!((told(&format!("close {}", ids[0])), told(&format!("close {}", ids[1]))), (1, 0));
    // The last handle is gone before the connection is closed, and the hook still gets the id.
    drop(db);
    assert!(wait::until(Duration::from_secs(5), || told(&format!("close {}", ids[1])) == 1));
}
