//! A context with one SELECT by primary key, against the same statements without this crate.

use std::cell::{Cell, RefCell};
use std::hint::black_box;
use std::time::Duration;

use diesel::QueryResult;
use diesel_session::pool::Reset;
use diesel_session::{App, Config, Error};

use crate::contest::{Baseline, Contest, timed};
use crate::peer::{self, Pool};
use crate::table::{Conn, Item, ROWS};

pub fn measure<C: Conn>(url: &str, rounds: usize) {
    let mut held = C::establish(url).unwrap();
    let app = C::db().init_app("reads", Config::new(url)).unwrap();
    // Its connection is opened first, for what it sets for the whole file (SQLite's WAL).
    app.ping().unwrap();
    held.fill();
    let held = RefCell::new(held);
    let (pinging, trusting) = (peer::pool::<C>(url, 8, true), peer::pool::<C>(url, 8, false));
    let next = Ids::default();
    let (held, app, next) = (&held, &app, &next);

    let mut contest = Contest::new(format!("{}: one SELECT by primary key", C::NAME));
    let mut compare = |statements: &str, plain: fn(&mut C, i32) -> QueryResult<Item>, ours: &[(&str, Ours<C>)]| {
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
    let eager: (&str, Ours<C>) =
        ("context, begun eagerly", |app, id| app.scope().begin_eagerly().run_and_commit(|| read::<C>(id)));
    compare("SELECT", C::select, &[autocommit, default, eager]);
    compare(&format!("{}, SELECT, COMMIT", C::BEGIN_READ_ONLY), C::read_only, &[read_only]);
    compare(&format!("{}, SELECT, COMMIT", C::BEGIN), C::read_write, &[eager]);
    contest.hold(rounds);
    several::<C>(held, app, &trusting, next, rounds);
    resets::<C>(url, rounds);
    C::db().remove_app("reads").unwrap();
}

/// The number of SELECTs for which [`several`] shows the cost of one.
const SEVERAL: u32 = 5;

/// The cost of giving the connection back after each SELECT, as a session does that has only read. Only the SELECTs are
/// timed: neither the context nor `BEGIN` and `COMMIT`.
fn several<C: Conn>(held: &RefCell<C>, app: &App<C>, pool: &Pool<C>, next: &Ids, rounds: usize) {
    let selects = |select: &mut dyn FnMut(i32) -> Item| timed(SEVERAL.into(), || drop(black_box(select(next.id()))));
    let in_context = |begins: bool| {
        let run = || {
            let session = C::db().session()?;
            if begins {
                session.begin()?;
            }
            Ok(selects(&mut |id| C::select_in(&session, id).unwrap()))
        };
        app.run(run).unwrap()
    };
    let mut contest = Contest::new(format!("{}: each of {SEVERAL} SELECTs, without what surrounds them", C::NAME));
    let baseline = contest
        .baseline("plain Diesel", |times| each(times, || selects(&mut |id| held.borrow_mut().select(id).unwrap())));
    contest.against(baseline, "  context, a checkout for each", |times| each(times, || in_context(false)));
    contest.against(baseline, "  Diesel + r2d2, no ping, a checkout for each", |times| {
        each(times, || selects(&mut |id| pool.get().unwrap().select(id).unwrap()))
    });
    contest.against(baseline, "  Diesel + r2d2, one checkout", |times| {
        each(times, || {
            let mut conn = pool.get().unwrap();
            selects(&mut |id| conn.select(id).unwrap())
        })
    });
    let baseline = contest.baseline("plain Diesel, in a transaction", |times| {
        each(times, || {
            let mut conn = held.borrow_mut();
            conn.transaction(|conn| QueryResult::Ok(selects(&mut |id| conn.select(id).unwrap()))).unwrap()
        })
    });
    contest.against(baseline, "  context, begun", |times| each(times, || in_context(true)));
    contest.hold(rounds);
}

/// Runs so many series of SELECTs. Returns the time of one SELECT of each series.
fn each(times: u64, mut series: impl FnMut() -> Duration) -> Duration {
    (0..times).map(|_| series()).sum::<Duration>() / SEVERAL
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
    plain: fn(&mut C, i32) -> QueryResult<Item>,
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
