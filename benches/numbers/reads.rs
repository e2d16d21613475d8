//! A context with one SELECT by primary key, against the same statements without this crate.

use std::cell::Cell;
use std::hint::black_box;

use diesel_session::{App, Config, Error};

use diesel_session::pool::Reset;

use crate::contest::{Baseline, Contest, timed};
use crate::peer::{self, Pool};
use crate::table::{Conn, Item, ROWS};

pub fn measure<C: Conn>(url: &str, rounds: usize) {
    let mut held = C::establish(url).unwrap();
    let app = C::db().init_app("reads", Config::new(url)).unwrap();
    // Its connection is opened first, for what it sets for the whole file (SQLite's WAL).
    app.ping().unwrap();
    held.fill();
    let held = std::cell::RefCell::new(held);
    let (pinging, trusting) = (peer::pool::<C>(url, 8, true), peer::pool::<C>(url, 8, false));
    let next = Ids::default();
    let (held, app, next) = (&held, &app, &next);

    let mut contest = Contest::new(format!("{}: one SELECT by primary key", C::NAME));
    let mut compare =
        |statements: &str, plain: fn(&mut C, i32) -> diesel::QueryResult<Item>, ours: &[(&str, Ours<C>)]| {
            let baseline = contest.baseline(format!("{statements}: plain Diesel"), move |times| {
                let mut conn = held.borrow_mut();
                timed(times, || drop(black_box(plain(&mut conn, next.id()).unwrap())))
            });
            for &(name, ours) in ours {
                contest.against(baseline, format!("  {name}"), move |times| {
                    timed(times, || drop(black_box(ours(app, next.id()).unwrap())))
                });
            }
            pooled(&mut contest, baseline, "  Diesel + r2d2, no ping", &trusting, plain, next);
            pooled(&mut contest, baseline, "  Diesel + r2d2", &pinging, plain, next);
        };
    let autocommit: (&str, Ours<C>) = ("context, autocommit", |app, id| app.scope().autocommit().run(|| read::<C>(id)));
    let default: (&str, Ours<C>) = ("context", |app, id| app.run(|| read::<C>(id)));
    let read_only: (&str, Ours<C>) =
        ("context, read-only", |app, id| app.scope().read_only().run_and_commit(|| read::<C>(id)));
    let begun: (&str, Ours<C>) = ("context, begun to write", |app, id| {
        app.run(|| {
            let session = C::db().session()?;
            session.begin()?;
            C::select_in(&session, id)
        })
    });
    // SQLite's default scope reads outside of a transaction.
    if C::NAME.starts_with("SQLite") {
        compare("SELECT", C::select, &[autocommit, default]);
        compare("BEGIN, SELECT, COMMIT", C::read_only, &[read_only]);
        compare("BEGIN IMMEDIATE, SELECT, COMMIT", C::read_write, &[begun]);
    } else {
        compare("SELECT", C::select, &[autocommit]);
        compare("BEGIN READ ONLY, SELECT, COMMIT", C::read_only, &[read_only]);
        compare("BEGIN, SELECT, COMMIT", C::read_write, &[default]);
    }
    contest.hold(rounds);
    resets::<C>(url, rounds);
    C::db().remove_app("reads").unwrap();
}

/// The cost of the reset after raw access to the connection, with and without a reset.
fn resets<C: Conn>(url: &str, rounds: usize) {
    let app = |id: &str, reset| C::db().init_app(id, Config::new(url).reset(reset)).unwrap();
    let (never, when_dirty) = (app("never", Reset::Never), app("when dirty", Reset::WhenDirty));
    let raw_access = |app: &App<C>, times| {
        timed(times, || {
            let run = || C::db().session()?.with(|conn| conn.batch_execute("SELECT 1"));
            app.run(run).unwrap();
        })
    };
    let mut contest = Contest::new(format!("{}: `SELECT 1` on the raw connection, in a transaction", C::NAME));
    let baseline = contest.baseline("Reset::Never", |times| raw_access(&never, times));
    contest.against(baseline, "Reset::WhenDirty", |times| raw_access(&when_dirty, times));
    contest.hold(rounds);
    for id in ["never", "when dirty"] {
        C::db().remove_app(id).unwrap();
    }
}

type Ours<C> = fn(&App<C>, i32) -> Result<Item, Error>;

fn read<C: Conn>(id: i32) -> Result<Item, Error> {
    C::select_in(&C::db().session()?, id)
}

fn pooled<'c, C: Conn>(
    contest: &mut Contest<'c>,
    baseline: Baseline,
    name: &str,
    pool: &'c Pool<C>,
    plain: fn(&mut C, i32) -> diesel::QueryResult<Item>,
    next: &'c Ids,
) {
    contest.against(baseline, name, move |times| {
        timed(times, || drop(black_box(plain(&mut pool.get().unwrap(), next.id()).unwrap())))
    });
}

/// Keys in an order that is the same for every contender.
#[derive(Default)]
struct Ids(Cell<i32>);

impl Ids {
    fn id(&self) -> i32 {
        self.0.set((self.0.get() + 7) % ROWS);
        self.0.get()
    }
}
