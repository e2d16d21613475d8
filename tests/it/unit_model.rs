//! Random work in nested savepoints, compared with what the table has after each step.

use diesel::connection::SimpleConnection;
use diesel::prelude::*;
use diesel_session::{Config, Database, Entity, Error, Result, Session, State, Tracked};

use crate::fixtures::unique;

diesel::table! { things (code) { code -> Text, name -> Text, } }

#[derive(Debug, Clone, PartialEq, Queryable, Selectable, Entity)]
#[diesel(table_name = things, primary_key(code))]
#[entity(new = NewThing)]
struct Thing {
    code: String,
    name: String,
}

static DB: Database<SqliteConnection> = Database::without_migrations();

const CODES: [&str; 3] = ["a", "b", "c"];

/// One run: the session, every handle there has been, and what is left to chance.
struct Run {
    session: Session<SqliteConnection>,
    handles: Vec<Tracked<Thing>>,
    chance: u64,
    seed: u64,
}

impl Run {
    fn below(&mut self, end: u64) -> u64 {
        self.chance = self.chance.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.chance >> 33) % end
    }

    /// A handle whose row can be written to and is not about to be deleted.
    fn live(&self, code: &str) -> Option<Tracked<Thing>> {
        let deleted = self.session.deleted();
        let doomed = |handle: &Tracked<Thing>| deleted.of::<Thing>().any(|(_, other)| other == handle);
        let live = |handle: &&Tracked<Thing>| handle.state() == State::Persistent && handle.read().code == code;
        self.handles.iter().rev().filter(live).find(|handle| !doomed(handle)).cloned()
    }

    fn work(&mut self, depth: u32) -> Result<()> {
        for _ in 0..=self.below(8) {
            let code = CODES[self.below(3) as usize];
            let (what, name, keeps) = (self.below(9), self.below(1000), self.below(2) == 0);
            let session = self.session.clone();
            match (what, self.live(code)) {
                (0 | 1, _) => {
                    if session.get::<Thing>(code)?.is_none() {
                        self.handles.push(session.add(NewThing { code: code.into(), name: "new".into() }));
                    }
                }
                (2 | 3, Some(handle)) => handle.write().name = name.to_string(),
                (4, Some(handle)) => session.delete(&handle)?,
                (5 | 6, _) if depth < 4 => {
                    let undone = session.savepoint(|_| {
                        self.work(depth + 1)?;
                        if keeps {
                            Ok(())
                        } else {
                            Err(Error::NotFound { row: None, at: std::panic::Location::caller() })
                        }
                    });
                    assert_eq!(undone.is_ok(), keeps, "{undone:?}");
                }
                (7, _) if depth == 0 => {
                    if keeps {
                        session.commit()?
                    } else {
                        session.rollback()?
                    }
                }
                // Behind the back of what is kept.
                (8, _) => drop(session.execute(diesel::delete(things::table.find(code)))?),
                _ => continue,
            }
            if keeps || what >= 5 {
                self.check()?;
            }
        }
        Ok(())
    }

    /// What is found by key is what the table has, and no handle claims anything else.
    fn check(&self) -> Result<()> {
        let seed = self.seed;
        self.session.flush()?;
        let rows: Vec<(String, String)> = self.session.load(things::table)?;
        for code in CODES {
            let found = self.session.get::<Thing>(code)?;
            let stored = rows.iter().find(|(other, _)| other == code).map(|(_, name)| name.clone());
            assert_eq!(found.as_ref().map(|thing| thing.read().name.clone()), stored, "seed {seed}: {code}");
            let there = self.handles.iter().filter(|handle| {
                matches!(handle.state(), State::Persistent | State::Expired) && handle.read().code == code
            });
            there.for_each(|handle| assert_eq!(Some(handle), found.as_ref(), "seed {seed}: one row, one handle"));
        }
        for handle in self.handles.iter().filter(|handle| handle.state() == State::Persistent) {
            let Thing { code, name } = handle.read().clone();
            assert!(rows.contains(&(code, name)), "seed {seed}: {handle:?} is not in {rows:?}");
        }
        Ok(())
    }
}

#[test]
fn what_is_in_memory_is_what_the_table_has() {
    for seed in 0..300 {
        let app = DB.init_app(unique("model"), Config::new(":memory:")).unwrap();
        let outcome = app.context(|| {
            let session = DB.session()?;
            session
                .with(|conn| conn.batch_execute("CREATE TABLE things (code TEXT PRIMARY KEY, name TEXT NOT NULL)"))?;
            session.commit()?;
            let mut run = Run { session, handles: Vec::new(), chance: seed * 7919 + 1, seed };
            (0..4).try_for_each(|_| run.work(0))
        });
        outcome.unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        DB.remove_app(app.id()).unwrap();
    }
}
