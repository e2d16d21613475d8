//! What it costs that a session keeps rows, against the same statements by plain Diesel.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::hint::black_box;
use std::rc::Rc;
use std::time::{Duration, Instant};

use diesel_session::unit_of_work::{Insert, Persist};
use diesel_session::{Config, Session};

use crate::contest::{Contest, timed};
use crate::users::{Keeper, NewUser, User, new_user};

pub fn measure<C>(url: &str, rounds: usize)
where
    C: Keeper,
    User: Persist<C>,
    NewUser: Insert<C>,
{
    let rows = rows(rounds);
    let app = C::db().init_app("unit", Config::new(url)).unwrap();
    // Its connection is opened first, for what it sets for the whole file (SQLite's WAL).
    app.ping().unwrap();
    let mut plain = C::establish(url).unwrap();
    plain.fill_users(rows);
    let plain = RefCell::new(plain);
    app.enter(|| {
        let session = C::db().session().unwrap();
        known::<C>(&session, rounds);
        read::<C>(&session, &plain, rounds);
        insert::<C>(&session, &plain, rounds);
        session.rollback().unwrap();
    });
    C::db().remove_app("unit").unwrap();
}

/// Enough to tell, or enough to see that it runs.
fn rows(rounds: usize) -> usize {
    if rounds == 1 { 500 } else { 10_000 }
}

/// What sends nothing.
fn known<C>(session: &Session<C>, rounds: usize)
where
    C: Keeper,
    User: Persist<C>,
    NewUser: Insert<C>,
{
    let users = C::track_in(session).unwrap();
    let ids: Vec<i32> = users.iter().map(|user| user.read().id).collect();
    let map: HashMap<i32, Rc<User>> =
        ids.iter().zip(&users).map(|(&id, user)| (id, Rc::new((*user.read()).clone()))).collect();
    let turn = Cell::new(0);
    let next = || {
        turn.set((turn.get() + 7) % ids.len());
        ids[turn.get()]
    };
    let mut contest = Contest::new(format!("{}: {} rows that a session has", C::NAME, users.len()));
    let baseline = contest.baseline("a row by its key from a HashMap of Rc", |times| {
        timed(times, || drop(black_box(map.get(&next()).cloned().unwrap())))
    });
    contest.against(baseline, "get", |times| {
        timed(times, || drop(black_box(session.get::<User>(next()).unwrap().unwrap())))
    });
    contest.against(baseline, "get of the same row again", |times| {
        timed(times, || drop(black_box(session.get::<User>(ids[0]).unwrap().unwrap())))
    });
    contest.against(baseline, "flush of nothing", |times| timed(times, || session.flush().unwrap()));
    contest.hold(rounds);
    session.rollback().unwrap();
    session.expunge_all();
}

fn read<C>(session: &Session<C>, plain: &RefCell<C>, rounds: usize)
where
    C: Keeper,
    User: Persist<C>,
    NewUser: Insert<C>,
{
    let mut contest = Contest::new(format!("{}: a query of {} rows", C::NAME, rows(rounds)));
    let baseline = contest
        .baseline("load by plain Diesel", |times| each(times, || plain.borrow_mut().load_users().unwrap(), || ()));
    contest.against(baseline, "load", |times| each(times, || C::load_in(session).unwrap(), || ()));
    contest.against(baseline, "track, none known", |times| {
        each(times, || C::track_in(session).unwrap(), || session.expunge_all())
    });
    contest.against(baseline, "track, all known", |times| {
        let kept = C::track_in(session).unwrap();
        let took = each(times, || C::track_in(session).unwrap(), || ());
        session.expunge_all();
        drop(kept);
        took
    });
    contest.hold(rounds);
    session.rollback().unwrap();
}

fn insert<C>(session: &Session<C>, plain: &RefCell<C>, rounds: usize)
where
    C: Keeper,
    User: Persist<C>,
    NewUser: Insert<C>,
{
    let rows = rows(rounds);
    let chunk = <NewUser as Insert<C>>::MAX_INSERT_ROWS;
    let mut contest = Contest::new(format!("{}: {rows} INSERTs, {chunk} rows a statement, rolled back", C::NAME));
    let baseline = contest.baseline("plain Diesel", |times| {
        let mut conn = plain.borrow_mut();
        (0..times)
            .map(|_| {
                conn.begin();
                let took = once(|| conn.insert_all((0..rows).map(new_user).collect()).unwrap());
                conn.batch_execute("ROLLBACK").unwrap();
                took
            })
            .sum()
    });
    contest.against(baseline, "add and flush", |times| {
        (0..times)
            .map(|_| {
                session.begin().unwrap();
                let took = once(|| {
                    let users: Vec<_> = (0..rows).map(|number| session.add(new_user(number)).unwrap()).collect();
                    session.flush().unwrap();
                    users
                });
                session.rollback().unwrap();
                session.expunge_all();
                took
            })
            .sum()
    });
    contest.hold(rounds);
}

/// UPDATEs of all rows, against one statement for each thousand of them written by hand.
#[cfg(feature = "postgres")]
pub fn update(url: &str, rounds: usize) {
    use crate::table::Conn;
    use crate::users::rename;
    use diesel::connection::SimpleConnection;
    use diesel::{Connection, PgConnection};

    let app = PgConnection::db().init_app("updates", Config::new(url)).unwrap();
    let mut plain = PgConnection::establish(url).unwrap();
    plain.fill_users(rows(rounds));
    let known = plain.load_users().unwrap();
    app.enter(|| {
        let session = PgConnection::db().session().unwrap();
        let mut contest = Contest::new(format!("PostgreSQL: {} UPDATEs, rolled back", known.len()));
        let baseline = contest.baseline("UPDATE .. FROM unnest by hand", |times| {
            (0..times)
                .map(|_| {
                    plain.begin();
                    let took = once(|| {
                        let renamed = rename(&mut plain, &known, |user| format!("{} the second", user.name)).unwrap();
                        assert_eq!(renamed, known.len());
                    });
                    plain.batch_execute("ROLLBACK").unwrap();
                    took
                })
                .sum()
        });
        contest.against(baseline, "write and flush", |times| {
            (0..times)
                .map(|_| {
                    let users = PgConnection::track_in(&session).unwrap();
                    let took = once(|| {
                        users.iter().for_each(|user| user.write().name.push_str(" the second"));
                        session.flush().unwrap();
                    });
                    session.rollback().unwrap();
                    session.expunge_all();
                    took
                })
                .sum()
        });
        contest.hold(rounds);
        session.rollback().unwrap();
    });
    PgConnection::db().remove_app("updates").unwrap();
}

/// What `once` gives is dropped outside of the measurement, and so is what `after` does.
fn each<R>(times: u64, mut run: impl FnMut() -> R, mut after: impl FnMut()) -> Duration {
    (0..times)
        .map(|_| {
            let took = once(&mut run);
            after();
            took
        })
        .sum()
}

/// What `run` gives is dropped outside of the measurement.
fn once<R>(run: impl FnOnce() -> R) -> Duration {
    let started = Instant::now();
    let made = black_box(run());
    let took = started.elapsed();
    drop(made);
    took
}
