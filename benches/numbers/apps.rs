//! What applications cost that are registered: time, a context, memory.

use diesel::SqliteConnection;
use diesel_session::{App, Config, Database};

use crate::contest::{Contest, timed};

type Db = Database<SqliteConnection>;

/// How many applications a database object has, in each of the three cases; each case has ten thousand in all.
const SIZES: [usize; 3] = [1, 100, 10_000];
const ALL: usize = 10_000;

pub fn measure(rounds: usize) {
    let mut kept = Vec::new();
    println!("\nApplications at rest");
    for size in SIZES {
        let databases: Vec<&'static Db> = (0..ALL / size).map(|_| database()).collect();
        let before = resident();
        let apps: Vec<App<_>> = databases.iter().flat_map(|db| (0..size).map(|number| init(db, number))).collect();
        let each = resident().saturating_sub(before) / ALL;
        println!("  {:<46} {each:>7} B", format!("memory of one among {size}"));
        kept.push((size, databases[0], apps));
    }

    let mut contest = Contest::new("With so many applications registered");
    let mut first = None;
    for (size, db, _) in &kept {
        let run = |times| {
            timed(times, || {
                init(db, ALL);
                db.remove_app(&name(ALL)).unwrap();
            })
        };
        let label = format!("init_app and remove_app, beside {size}");
        match first {
            None => first = Some(contest.baseline(label, run)),
            Some(baseline) => contest.against(baseline, label, run),
        }
    }
    let mut first = None;
    for (size, _, apps) in &kept {
        let mut turn = 0;
        let run = move |times| {
            timed(times, || {
                turn = (turn + 101) % size;
                apps[turn].enter(|| ());
            })
        };
        let label = format!("an empty context of one among {size}");
        match first {
            None => first = Some(contest.baseline(label, run)),
            Some(baseline) => contest.against(baseline, label, run),
        }
    }
    contest.hold(rounds);
}

/// A database object lives as long as the program.
fn database() -> &'static Db {
    Box::leak(Box::new(Database::without_migrations()))
}

fn init(db: &'static Db, number: usize) -> App<SqliteConnection> {
    db.init_app(name(number), Config::new("shop.sqlite")).unwrap()
}

fn name(number: usize) -> String {
    format!("shop-{number}")
}

/// Resident memory in bytes.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
}
