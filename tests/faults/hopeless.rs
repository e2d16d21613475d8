//! Waits that cannot end are refused at once; waits that can are not, however long they take.

use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use diesel::prelude::*;
use diesel_session::{App, Database, Error};

use crate::fixtures::threads::together;
use crate::fixtures::{Conn, Site, Speak, unique};
use crate::support::wait;
use crate::{on_every_database, on_every_server};

on_every_database!(
    two_threads_each_want_what_the_other_has,
    four_threads_each_want_two_of_four,
    a_nested_context_waits_for_those_who_run,
);
on_every_server!(two_applications_share_a_limit, a_limit_waits_for_those_who_run);

const AT_ONCE: Duration = Duration::from_millis(200);
const ONE: &str = "SELECT count(*) AS number FROM (SELECT 1 AS one) AS ones";

/// Takes a connection of `app` for as long as `body` runs.
fn holding<C: Conn, T>(db: &Database<C>, app: &App<C>, body: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    app.scope().read_only().run(|| {
        db.session()?.begin()?;
        body()
    })
}

fn two_threads_each_want_what_the_other_has<C: Conn>(site: &Site) {
    let db = C::new_db();
    let apps = ["first", "second"].map(|name| db.init_app(unique(name), site.config().max_size(1)).unwrap());
    let both = Barrier::new(2);
    let outcomes = together(2, |number| {
        holding(&db, &apps[number], || {
            both.wait();
            let asked = Instant::now();
            let outcome = holding(&db, &apps[1 - number], || Ok(()));
            assert!(outcome.is_ok() || asked.elapsed() < AT_ONCE, "{:?}", asked.elapsed());
            outcome
        })
    });
    let refused: Vec<&Error> = outcomes.iter().filter_map(|outcome| outcome.as_ref().err()).collect();
    let [error] = refused[..] else { panic!("one of the two is refused: {outcomes:?}") };
    let Error::WouldDeadlock { holders, .. } = error else { panic!("{error}") };
    assert_eq!(holders.len(), 1);
    let waits_at = holders[0].waits_at().expect("the other waits");
    assert_eq!(waits_at.file(), file!());
    let text = error.to_string();
    assert!(text.contains(&format!("itself waiting at {}:{}", file!(), waits_at.line())), "{text}");
    assert!(text.contains("Take connections in the same order everywhere") && error.is_transient(), "{text}");
    assert_eq!(apps.each_ref().map(|app| (app.status().in_use, app.status().waiting)), [(0, 0); 2]);
    db.dispose_all().unwrap();
}

/// Every thread has one and wants another of the same pool.
fn four_threads_each_want_two_of_four<C: Conn>(site: &Site) {
    let db = C::new_db();
    let app = db.init_app(unique("four"), site.config().max_size(4)).unwrap();
    for _ in 0..10 {
        let all = Barrier::new(4);
        let started = Instant::now();
        let outcomes = together(4, |_| {
            holding(&db, &app, || {
                all.wait();
                holding(&db, &app, || Ok(()))
            })
        });
        let refused: Vec<&Error> = outcomes.iter().filter_map(|outcome| outcome.as_ref().err()).collect();
        let [error] = refused[..] else { panic!("one of the four is refused: {outcomes:?}") };
        assert!(matches!(error, Error::WouldDeadlock { holders, .. } if holders.len() == 4), "{error}");
        assert!(error.to_string().contains("Let each thread hold one connection at a time"), "{error}");
        assert!(error.is_transient(), "{error}");
        assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
    }
    db.dispose_all().unwrap();
}

/// Ten of ten are out, and one of the holders enters a nested context: the others run, so it waits.
fn a_nested_context_waits_for_those_who_run<C: Conn>(site: &Site) {
    let db = C::new_db();
    let app = db.init_app(unique("ten"), site.config().max_size(10)).unwrap();
    let all = Barrier::new(10);
    let waits = together(10, |number| {
        holding(&db, &app, || {
            all.wait();
            if number < 9 {
                // Nine wait, and the last one works until it sees that.
                let asked = Instant::now();
                return holding(&db, &app, || Ok(asked.elapsed()));
            }
            assert!(wait::until(Duration::from_secs(2), || app.status().waiting == 9));
            thread::sleep(Duration::from_millis(150));
            Ok(Duration::ZERO)
        })
        .unwrap()
    });
    assert!(waits[..9].iter().all(|wait| *wait >= Duration::from_millis(100)), "{waits:?}");
    db.dispose_all().unwrap();
}

/// What is short is the limit of the database object, not a pool.
fn two_applications_share_a_limit<C: Conn>(site: &Site) {
    let db = C::new_db().max_connections(2);
    let apps: Vec<App<C>> = (0..4).map(|_| db.init_app(unique("shared"), site.config()).unwrap()).collect();
    for _ in 0..10 {
        let both = Barrier::new(2);
        let outcomes = together(2, |number| {
            holding(&db, &apps[number], || {
                both.wait();
                let asked = Instant::now();
                let outcome = holding(&db, &apps[2 + number], || Ok(()));
                assert!(outcome.is_ok() || asked.elapsed() < AT_ONCE, "{:?}", asked.elapsed());
                outcome
            })
        });
        let refused: Vec<&Error> = outcomes.iter().filter_map(|outcome| outcome.as_ref().err()).collect();
        let [error] = refused[..] else { panic!("one of the two is refused: {outcomes:?}") };
        assert!(matches!(error, Error::WouldDeadlock { .. }), "{error}");
        assert!(error.to_string().contains("max_connections"), "{error}");
    }
    // One thread that has all of it.
    let error = holding(&db, &apps[0], || holding(&db, &apps[1], || holding(&db, &apps[2], || Ok(())))).unwrap_err();
    assert!(matches!(&error, Error::WouldDeadlock { holders, .. } if holders.len() >= 2), "{error}");
    assert!(error.to_string().contains("this thread itself holds"), "{error}");
    db.dispose_all().unwrap();
    site.assert_connections(0);
}

fn a_limit_waits_for_those_who_run<C: Conn>(site: &Site) {
    let db = C::new_db().max_connections(2);
    let apps: Vec<App<C>> = (0..3).map(|_| db.init_app(unique("shared"), site.config()).unwrap()).collect();
    let both = Barrier::new(2);
    together(2, |number| {
        holding(&db, &apps[number], || {
            both.wait();
            if number == 1 {
                assert!(wait::until(Duration::from_secs(2), || { apps[2].status().waiting == 1 }));
                thread::sleep(Duration::from_millis(150));
                return Ok(());
            }
            holding(&db, &apps[2], || Ok(()))
        })
        .unwrap();
    });
    db.dispose_all().unwrap();
}

/// The queue of SQLite's writers is one of the things that a thread may wait for.
#[test]
fn a_circle_through_the_queue_of_writers() {
    let (first, second) = (Site::sqlite(), Site::sqlite());
    let db = SqliteConnection::new_db();
    let apps = [&first, &second].map(|site| db.init_app(unique("writer"), site.config()).unwrap());
    let both = Barrier::new(2);
    let outcomes = together(2, |number| {
        apps[number].context(|| {
            db.session()?.begin()?;
            both.wait();
            let asked = Instant::now();
            let outcome = apps[1 - number].context(|| db.session()?.begin());
            assert!(outcome.is_ok() || asked.elapsed() < AT_ONCE, "{:?}", asked.elapsed());
            outcome
        })
    });
    let refused: Vec<&Error> = outcomes.iter().filter_map(|outcome| outcome.as_ref().err()).collect();
    let [error] = refused[..] else { panic!("one of the two is refused: {outcomes:?}") };
    assert!(error.to_string().contains("the write lock of this SQLite database"), "{error}");
    assert_eq!(apps[0].open_session().unwrap().number(ONE).unwrap(), 1);
    db.dispose_all().unwrap();
}
