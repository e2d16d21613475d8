//! Random work in nested savepoints, compared with what the table has.

#![allow(missing_docs, unused_crate_dependencies)]
#![cfg(feature = "sqlite")]
use diesel::prelude::*;
use diesel_session::{Config, Database, Entity, Session, State, Tracked};
diesel::table! { things (code) { code -> Text, name -> Text, } }
#[derive(Debug, Clone, PartialEq, Queryable, Selectable, Identifiable, Entity)]
#[diesel(table_name = things, primary_key(code))]
#[entity(new = NewThing)]
struct Thing {
    code: String,
    name: String,
}
static DB: Database<SqliteConnection> = Database::without_migrations();
fn make(c: &str) -> NewThing {
    NewThing { code: c.into(), name: "a".into() }
}
#[test]
fn probe() {
    let app = DB.init_app("probe", Config::new(":memory:")).unwrap();
    app.context(|| {
        let s = DB.session()?;
        s.with(|c| {
            diesel::connection::SimpleConnection::batch_execute(
                c,
                "CREATE TABLE things (code TEXT PRIMARY KEY, name TEXT NOT NULL)",
            )
        })?;
        let a = s.add(make("a"));
        s.commit()?;
        let mut guard = a.write();
        guard.name = "w".into();
        s.rollback()?;
        guard.name = "ww".into();
        assert!(s.refresh(&a).is_err());
        drop(guard);
        eprintln!("guard: {:?} {}", a.state(), s.find::<Thing>("a")?.read().name);
        assert_eq!(a.read().name, "a");
        // Deleted behind the session's back, written, and added again.
        s.execute(diesel::delete(things::table))?;
        a.write().name = "x".into();
        let b = s.add(make("a"));
        s.flush()?;
        assert_eq!((a.state(), b.state()), (State::Deleted, State::Persistent));
        s.rollback()?;
        eprintln!("again: {:?} {:?}", a.state(), s.get::<Thing>("a")?.map(|t| t == a));
        Ok::<_, diesel_session::Error>(())
    })
    .unwrap();
}
fn check(s: &Session<SqliteConnection>, seed: u64, step: usize) {
    s.flush().unwrap();
    let rows: Vec<(String, String)> = s.with(|c| things::table.load(c)).unwrap();
    for k in ["a", "b", "c"] {
        let found = s.get::<Thing>(k).unwrap().map(|t| t.read().name.clone());
        let real = rows.iter().find(|r| r.0 == k).map(|r| r.1.clone());
        assert_eq!(found, real, "seed {seed} step {step} key {k}");
    }
}
fn steps(s: &Session<SqliteConnection>, r: &mut u64, all: &mut Vec<Tracked<Thing>>, depth: u32, seed: u64) {
    let mut next = |n: u64| {
        *r = r.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (*r >> 33) % n
    };
    let n = 1 + next(8);
    for step in 0..n as usize {
        let mut next = |n: u64| {
            *r = r.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (*r >> 33) % n
        };
        let k = ["a", "b", "c"][next(3) as usize];
        let (op, nm, keep) = (next(8), next(1000), next(2) == 0);
        let h = s
            .no_autoflush(|_| all.iter().rev().find(|h| h.state() == State::Persistent && h.read().code == k).cloned());
        match op {
            0 | 1 => {
                if s.get::<Thing>(k).unwrap().is_none() {
                    all.push(s.add(make(k)))
                }
            }
            2 | 3 => {
                if let Some(h) = h {
                    if !s.deleted().of::<Thing>().any(|(_, d)| *d == h) {
                        h.write().name = nm.to_string();
                    }
                }
            }
            4 => {
                if let Some(h) = h {
                    s.delete(&h).unwrap()
                }
            }
            5 | 6 if depth < 4 => {
                let _ = s.savepoint(|s| {
                    steps(s, r, all, depth + 1, seed);
                    if keep {
                        Ok(())
                    } else {
                        Err(diesel_session::Error::NotFound { row: None, at: std::panic::Location::caller() })
                    }
                });
            }
            7 if depth == 0 => {
                if keep {
                    s.commit().unwrap()
                } else {
                    s.rollback().unwrap()
                }
            }
            _ => continue,
        }
        if keep || op >= 5 {
            check(s, seed, step);
            let rows: Vec<(String, String)> = s.with(|c| things::table.load(c)).unwrap();
            for h in all.iter().filter(|h| h.state() == State::Persistent) {
                let v = h.read();
                assert!(rows.contains(&(v.code.clone(), v.name.clone())), "seed {seed} step {step} {h:?} {:?}", v.name);
            }
        }
    }
}
#[test]
fn model() {
    for seed in 0..300u64 {
        let app = DB.init_app(&format!("m{seed}"), Config::new(":memory:")).unwrap();
        app.context(|| {
            let s = DB.session()?;
            s.with(|c| {
                diesel::connection::SimpleConnection::batch_execute(
                    c,
                    "CREATE TABLE things (code TEXT PRIMARY KEY, name TEXT NOT NULL)",
                )
            })?;
            s.commit()?;
            let (mut r, mut all) = (seed * 7919 + 1, Vec::new());
            for _ in 0..4 {
                steps(&s, &mut r, &mut all, 0, seed);
            }
            Ok::<_, diesel_session::Error>(())
        })
        .unwrap();
        app.dispose().unwrap();
    }
}
