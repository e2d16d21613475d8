//! The hooks of the pool: when a connection is lent, when it comes back, and before it is closed.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use diesel::prelude::*;
use diesel_session::{App, Database, Error, Reset};

use crate::fixtures::{COUNT, Conn, INSERT, Site, Speak, unique};
use crate::{on_every_database, on_every_server};

on_every_database!(
    each_is_called_in_its_place,
    a_connection_that_is_closed_is_not_checked_in,
    a_checkout_that_fails_is_an_error_and_costs_no_permit,
    a_checkin_that_fails_costs_the_connection_only,
    a_panic_before_closing_is_contained,
    what_hooks_send_is_not_the_sessions,
);
on_every_server!(a_checkout_on_a_lost_connection_tries_another);

/// The hooks write down that they were called, in a table of the database under test.
fn log<C: Conn>(conn: &mut C, what: &str) -> QueryResult<()> {
    conn.batch_execute(&format!("INSERT INTO entries (author, message) VALUES ('{what}', 'hook')"))
}

fn connected<C: Conn>(conn: &mut C) -> QueryResult<()> {
    log(conn, "connect")
}

fn lent<C: Conn>(conn: &mut C) -> QueryResult<()> {
    log(conn, "checkout")
}

fn back<C: Conn>(conn: &mut C) -> QueryResult<()> {
    log(conn, "checkin")
}

fn closing<C: Conn>(conn: &mut C) {
    // Of a connection that is lost it cannot be written down.
    let _ = log(conn, "close");
}

fn logging<C: Conn>() -> Database<C> {
    C::new_db().on_connect(connected::<C>).on_checkout(lent::<C>).on_checkin(back::<C>).on_close(closing::<C>)
}

/// What has been written down since the last time.
fn taken<C: Conn>(observer: &App<C>) -> String {
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

fn observer<C: Conn>(site: &Site) -> crate::fixtures::Guard<C> {
    let app = C::app(site.config());
    app.create_all().unwrap();
    app
}

fn each_is_called_in_its_place<C: Conn>(site: &Site) {
    let seen = observer::<C>(site);
    let db = logging::<C>();
    let app = db.init_app(unique("hooks"), site.config().max_size(2)).unwrap();
    app.context(|| ());
    assert_eq!(taken(&seen), "");
    app.ping().unwrap();
    assert_eq!(taken(&seen), "connect checkout checkin");
    app.scope().read_only().run(|| db.session()?.begin()).unwrap();
    assert_eq!(taken(&seen), "checkout checkin");
    // A connection on which something was left, which is cleaned first, or closed.
    app.scope().commit_on_ok().run(|| db.session()?.send("CREATE TEMPORARY TABLE left_over (a INTEGER)")).unwrap();
    let cleaned = matches!(site, Site::Postgres(_));
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
    if matches!(site, Site::Sqlite(_)) {
        session.number(COUNT).unwrap();
    } else {
        session.begin().unwrap();
    }
    app.dispose().unwrap();
    session.rollback().unwrap();
    assert_eq!(taken(&seen), "connect checkout close");
}

fn a_connection_that_is_closed_is_not_checked_in<C: Conn>(site: &Site) {
    let seen = observer::<C>(site);
    let db = logging::<C>();
    let app = db.init_app(unique("hooks"), site.config().max_size(1).reset(Reset::Never)).unwrap();
    app.scope().commit_on_ok().run(|| db.session()?.send("CREATE TEMPORARY TABLE left_over (a INTEGER)")).unwrap();
    assert_eq!(taken(&seen), "connect checkout checkin");
    let session = app.open_session().unwrap();
    session.send("ROLLBACK").unwrap();
    session.rollback().unwrap();
    assert_eq!(taken(&seen), "checkout close");
    assert_eq!(app.status().open, 0);
}

/// In three ways; a panic costs the test time, so it is rare.
fn fails<C: Conn>(conn: &mut C) -> QueryResult<()> {
    static CALLS: AtomicUsize = AtomicUsize::new(0);
    match CALLS.fetch_add(1, Ordering::Relaxed) % 20 {
        0 => panic!("the hook panicked on purpose"),
        even if even % 2 == 0 => conn.batch_execute("BEGIN"),
        _ => conn.batch_execute("SELECT * FROM nowhere_at_all"),
    }
}

fn a_checkout_that_fails_is_an_error_and_costs_no_permit<C: Conn>(site: &Site) {
    let db = C::new_db().on_checkout(fails::<C>);
    let app = db.init_app(unique("hooks"), site.config().max_size(2)).unwrap();
    let mut texts = Vec::new();
    for _ in 0..100 {
        let error = app.context(|| db.session()?.number(COUNT)).unwrap_err();
        assert!(matches!(&error, Error::HookFailed { hook: "on_checkout", committed: false, .. }), "{error}");
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

fn a_checkin_that_fails_costs_the_connection_only<C: Conn>(site: &Site) {
    observer::<C>(site);
    let db = C::new_db().on_checkin(fails::<C>);
    let app = db.init_app(unique("hooks"), site.config().max_size(2)).unwrap();
    for number in 1..=100 {
        let count = app.scope().commit_on_ok().run(|| {
            let session = db.session()?;
            session.send(INSERT)?;
            session.number(COUNT)
        });
        assert_eq!(count.unwrap(), number);
        assert_eq!((app.status().open, app.status().in_use), (0, 0));
    }
    // Two are there for who needs two.
    let begun = || {
        app.scope().read_only().run(|| {
            db.session()?.begin()?;
            app.scope().read_only().run(|| db.session()?.begin())
        })
    };
    begun().unwrap();
    assert!(app.dispose_report().unwrap().is_complete());
}

fn a_panic_before_closing_is_contained<C: Conn>(site: &Site) {
    let db = C::new_db().on_close(|_| panic!("on purpose"));
    let app = db.init_app(unique("hooks"), site.config().max_size(2)).unwrap();
    for _ in 0..100 {
        app.ping().unwrap();
        assert_eq!(app.dispose_report().unwrap().closed, 1);
        assert_eq!((app.status().open, app.status().in_use), (0, 0));
    }
    site.assert_connections(0);
}

fn what_hooks_send_is_not_the_sessions<C: Conn>(site: &Site) {
    observer::<C>(site);
    fn noisy<C: Conn>(conn: &mut C) -> QueryResult<()> {
        let _ = conn.batch_execute("SELECT * FROM nowhere_at_all");
        conn.transaction(|conn| conn.batch_execute("SELECT 1"))?;
        conn.batch_execute("CREATE TEMPORARY TABLE IF NOT EXISTS of_the_hook (a INTEGER)")?;
        // The library's own is put in its place again.
        conn.set_instrumentation(|_: diesel::connection::InstrumentationEvent<'_>| {});
        Ok(())
    }
    let db = C::new_db().on_checkout(noisy::<C>).on_checkin(noisy::<C>);
    let app = db.init_app(unique("hooks"), site.config().max_size(1)).unwrap();
    for number in 1..=3 {
        let count = app.scope().commit_on_ok().run(|| {
            let session = db.session()?;
            session.send(INSERT)?;
            session.number(COUNT)
        });
        assert_eq!(count.unwrap(), number);
        // What the hook has left is the program's own, and closes nothing.
        assert_eq!(app.status().open, 1);
    }
    let ended = app.scope().commit_on_ok().run(|| db.session()?.send("ROLLBACK; BEGIN"));
    assert!(ended.unwrap_err().is_rollback_required(), "the session still sees what is sent");
}

fn a_checkout_on_a_lost_connection_tries_another<C: Conn>(site: &Site) {
    observer::<C>(site);
    let db = C::new_db().on_checkout(|conn| conn.batch_execute("SELECT 1"));
    let app = db.init_app(unique("hooks"), site.config()).unwrap();
    for _ in 0..5 {
        app.ping().unwrap();
        site.terminate_all();
        site.assert_connections(0);
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(app.context(|| db.session()?.number(COUNT)).unwrap(), 0);
    }
}
