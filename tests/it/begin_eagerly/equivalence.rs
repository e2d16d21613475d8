//! Random scopes, run once as a default scope and once with `begin_eagerly`. Both runs give the same results, errors,
//! handles, hooks and tables.
//!
//! The programs keep clear of the documented differences:
//! * A failed SELECT outside of the transaction does not abort the scope. The program rolls back after such a failure.
//! * `begin`, `transaction` and `retry` after reads begin a new transaction, where an eager scope has begun. A program
//!   calls them if neither scope has sent anything, or if both have begun.
//! * On SQLite an eager scope holds the write lock from its first statement on. The other connection writes if neither
//!   scope has sent anything, or if both have begun.
//!
//! MariaDB keeps or frees the locks of a statement that was undone, depending on what the transaction did before and on
//! its purge. There the other connection does not write after a failure in a transaction.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::rc::Rc;

use proptest::prelude::ProptestConfig;
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::{RngSeed, TestRunner};

use super::program::{Closure, End, FailingRead, HookOf, Key, Program, Step, programs};
use super::record::{Entry, Record, Shown, Stop, difference, ended, memory, result_of, shown};
use super::*;
use crate::unit_model::handles::{Handle, with_handle, with_table};
use crate::unit_model::number;
use crate::unit_model::rows::{Column, Table, told};
use crate::unit_model::tables::{FIRST_ROWS, NewUser, Stored, all_rows, users};

#[diesel::declare_sql_function]
extern "SQL" {
    fn abs(number: Integer) -> Integer;
}

diesel::table! { missing_rows (id) { id -> Integer, } }
diesel::table! {
    #[sql_name = "counters"]
    strict_counters (id) { id -> Integer, code -> Integer, }
}

/// How many programs run: fewer with the enum, which behaves as the others do.
fn cases() -> u64 {
    number("DIESEL_SESSION_MODEL_CASES").unwrap_or(if is_enum() { 50 } else { 300 })
}

/// How many runs the search for a smaller failing program takes.
const SHRINKING_RUNS: usize = 500;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Begins {
    AtFirstWrite,
    Eagerly,
}

/// Whether the transaction has begun, as far as the steps show it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Begun {
    /// In neither scope.
    No,
    /// Perhaps in the eager scope: the session has only read.
    Reads,
    /// Perhaps in both.
    Perhaps,
    /// In both.
    Yes,
}

struct Run<'r> {
    session: Session<Conn>,
    other: &'r mut OtherConnection,
    record: Rc<RefCell<Record>>,
    begins: Begins,
    begun: Begun,
    /// A statement or a closure has failed in this transaction.
    has_failed: bool,
    depth: usize,
    hooks: usize,
}

fn rows(session: &Session<Conn>, table: Table) -> Result<Vec<String>> {
    with_table!(table, T, table => {
        let rows = session.load::<T>(table::table.order(table::id))?;
        Ok(rows.iter().map(|row| format!("{row:?}")).collect())
    })
}

impl Run<'_> {
    fn say(&self, text: impl std::fmt::Display) {
        let text = format!("{}{text}", "    ".repeat(self.depth + 1));
        let memory = memory(&self.record.borrow().handles);
        self.record.borrow_mut().entries.push(Entry { text, memory });
    }

    /// A read follows. It flushes first.
    fn reads(&mut self) {
        let begun = if self.session.is_dirty() { Begun::Perhaps } else { Begun::Reads };
        self.begun = self.begun.max(begun);
    }

    fn wrote<T>(&mut self, result: Result<T>) -> Result<T> {
        self.begun = self.begun.max(if result.is_ok() { Begun::Yes } else { Begun::Perhaps });
        result
    }

    fn run(&mut self, steps: &[Step]) {
        for step in steps {
            self.step(step);
            self.check(step);
        }
    }

    fn check(&self, step: &Step) {
        let expected = match (self.begun, self.begins) {
            (Begun::No, _) | (Begun::Reads, Begins::AtFirstWrite) => false,
            (Begun::Yes, _) => true,
            (Begun::Reads, Begins::Eagerly) | (Begun::Perhaps, _) => return,
        };
        if self.session.in_transaction() != expected {
            let wrong = format!("{:?}: after `{step}` in_transaction() is {}", self.begins, !expected);
            self.record.borrow_mut().note_wrong(wrong);
        }
    }

    fn handle(&self, key: Key) -> Option<Handle> {
        self.record.borrow().handles.iter().rev().find(|(other, _)| *other == key).map(|(_, handle)| handle.clone())
    }

    fn keep(&self, key: Key, handle: Handle) -> String {
        let state = format!("{:?}", handle.state());
        let known = (key, handle);
        let mut record = self.record.borrow_mut();
        if !record.handles.contains(&known) {
            record.handles.push(known);
        }
        state
    }

    /// Runs one step and writes down its result.
    fn step(&mut self, step: &Step) {
        let is_settled = matches!(self.begun, Begun::No | Begun::Yes);
        let session = self.session.clone();
        let result = match step {
            Step::Count(table) => {
                self.reads();
                with_table!(*table, T, table => result_of(session.count(table::table)))
            }
            Step::Load(table) => {
                self.reads();
                let rows = rows(&session, *table);
                if rows.is_ok() && self.begins == Begins::Eagerly && !session.in_transaction() {
                    self.record.borrow_mut().note_wrong("an eager scope reads outside".into());
                }
                result_of(rows)
            }
            Step::Call(table) => {
                if KIND == Kind::Sqlite {
                    self.reads();
                }
                let called = with_table!(*table, T, table => session.load::<i32>(table::table.select(abs(table::n))));
                // Their order is that of the database.
                let sum = called.map(|numbers| numbers.into_iter().sum::<i32>());
                result_of(if KIND == Kind::Sqlite { sum } else { self.wrote(sum) })
            }
            Step::Get(key) => {
                self.reads();
                let got = with_table!(key.0, T, _table => session.get::<T>(key.1).map(|row| row.map(Handle::from)));
                result_of(got.map(|handle| handle.map(|handle| self.keep(*key, handle))))
            }
            Step::Find(key) => {
                self.reads();
                let found = with_table!(key.0, T, _table => session.find::<T>(key.1).map(Handle::from));
                result_of(found.map(|handle| self.keep(*key, handle)))
            }
            Step::Track(table) => {
                self.reads();
                result_of(self.track(*table))
            }
            Step::Fail(read) => return self.fail(step, *read),
            Step::Read(key) => match self.handle(*key) {
                Some(handle) => {
                    self.reads();
                    result_of(handle.read().map(|row| told(Some(&row))))
                }
                None => return,
            },
            Step::Refresh(key) => match self.handle(*key) {
                Some(handle) => {
                    self.reads();
                    result_of(with_handle!(&handle, tracked => session.refresh(tracked)))
                }
                None => return,
            },
            Step::Expire(key) => match self.handle(*key) {
                Some(handle) => result_of(with_handle!(&handle, tracked => session.expire(tracked))),
                None => return,
            },
            Step::Write { key, n } => match self.handle(*key) {
                Some(handle) => {
                    self.reads();
                    result_of(handle.update(Column::N, |row| Some(row.n + n)))
                }
                None => return,
            },
            Step::WriteCode { id, code } => match self.handle((Table::User, *id)) {
                Some(handle) => {
                    self.reads();
                    result_of(handle.update(Column::Code, |_| Some(*code)))
                }
                None => return,
            },
            Step::Delete(key) => match self.handle(*key) {
                Some(handle) => {
                    self.reads();
                    result_of(with_handle!(&handle, tracked => session.delete(tracked)))
                }
                None => return,
            },
            Step::Add { id, code } => {
                let new = NewUser { id: *id, code: Some(*code), n: 0, m: 0 };
                result_of(session.add(new).map(|handle| self.keep((Table::User, *id), handle.into())))
            }
            Step::Update { key, n } => {
                let update = with_table!(key.0, T, table => {
                    session.execute(diesel::update(table::table.find(key.1)).set(table::n.eq(table::n + *n)))
                });
                result_of(self.wrote(update))
            }
            Step::Insert { id, code } => {
                let new = (users::id.eq(*id), users::code.eq(Some(*code)), users::n.eq(0), users::m.eq(0));
                let insert = session.execute(diesel::insert_into(users::table).values(new));
                result_of(self.wrote(insert))
            }
            Step::RawUpdate { key, n } => {
                let sql = format!("UPDATE {} SET n = n + {n} WHERE id = {}", key.0.name(), key.1);
                let update = session.execute(sql_query(sql));
                result_of(self.wrote(update))
            }
            Step::Flush => {
                if session.is_dirty() {
                    self.begun = self.begun.max(Begun::Perhaps);
                }
                result_of(session.flush())
            }
            Step::OtherUpdate { .. } | Step::OtherDelete(_) | Step::OtherInsert(_) => {
                let may_differ = match KIND {
                    Kind::Sqlite => !is_settled,
                    Kind::Mariadb => self.has_failed,
                    Kind::Postgres => false,
                };
                if may_differ {
                    return;
                }
                Ok((if self.other.write(&other_sql(step)) { "taken" } else { "refused" }).into())
            }
            Step::Hook(hook) => self.hook(*hook),
            Step::Savepoint(closure) => return self.savepoint(closure),
            Step::Transaction(_) | Step::Retry(_) | Step::Begin if !is_settled => return,
            Step::Transaction(closure) => return self.transaction(step, closure),
            Step::Retry(closure) => return self.transaction(step, closure),
            Step::Begin => {
                let begin = session.begin();
                result_of(self.wrote(begin))
            }
            Step::Commit => {
                if session.is_dirty() {
                    self.begun = self.begun.max(Begun::Perhaps);
                }
                let commit = session.commit();
                if commit.is_ok() {
                    self.transaction_ends();
                }
                result_of(commit)
            }
            Step::Rollback => {
                let rollback = session.rollback();
                self.transaction_ends();
                result_of(rollback)
            }
        };
        self.say_result(step, result);
    }

    fn say_result(&mut self, step: &Step, result: Shown) {
        self.has_failed |= result.is_err() && self.begun >= Begun::Perhaps;
        self.say(format!("{step:<44} -> {}", result.unwrap_or_else(|error| error)));
    }

    fn transaction_ends(&mut self) {
        (self.begun, self.has_failed) = (Begun::No, false);
    }

    fn track(&self, table: Table) -> Result<Vec<String>> {
        let handles: Vec<(i32, Handle)> = with_table!(table, T, table => {
            let tracked = self.session.track::<T>(table::table.order(table::id))?;
            tracked.into_iter().map(|row| (row.read().id, Handle::from(row))).collect()
        });
        Ok(handles.into_iter().map(|(id, handle)| self.keep((table, id), handle)).collect())
    }

    fn fail(&mut self, step: &Step, read: FailingRead) {
        self.reads();
        let result = match read {
            FailingRead::OfNoTable => {
                self.session.load::<i32>(missing_rows::table.select(missing_rows::id)).map(|rows| rows.len())
            }
            FailingRead::OfNull => {
                self.session.load::<i32>(strict_counters::table.select(strict_counters::code)).map(|rows| rows.len())
            }
        };
        let is_error = result.is_err();
        self.say_result(step, result_of(result));
        if is_error && read == FailingRead::OfNoTable && self.begun != Begun::Yes {
            self.step(&Step::Rollback);
        }
    }

    fn hook(&mut self, hook: HookOf) -> Shown {
        self.hooks += 1;
        let (record, number) = (Rc::clone(&self.record), self.hooks);
        let run = move || {
            let memory = memory(&record.borrow().handles);
            record.borrow_mut().entries.push(Entry { text: format!("    hook {hook:?} {number} runs"), memory });
        };
        result_of(match hook {
            HookOf::BeforeCommit => self.session.before_commit(run),
            HookOf::AfterCommit => self.session.after_commit(run),
            HookOf::AfterRollback => self.session.after_rollback(run),
        })
    }

    /// Runs the steps of a closure, and ends as the closure does.
    fn inside(&mut self, closure: &Closure, depth: usize) -> Result<(), Stop> {
        (self.begun, self.depth) = (Begun::Yes, depth);
        self.run(&closure.steps);
        match closure.end {
            End::Ok => Ok(()),
            End::Err => Err(Stop::Wanted),
            // Without the message of the panic hook.
            End::Panic => resume_unwind(Box::new(())),
        }
    }

    fn savepoint(&mut self, closure: &Closure) {
        self.say("savepoint {");
        let (session, depth) = (self.session.clone(), self.depth);
        if session.is_dirty() {
            self.begun = self.begun.max(Begun::Perhaps);
        }
        let done = catch_unwind(AssertUnwindSafe(|| session.savepoint(|_| self.inside(closure, depth + 1))));
        self.depth = depth;
        self.has_failed |= !matches!(done, Ok(Ok(())));
        // It is refused before it begins.
        if self.begun < Begun::Yes {
            self.begun = Begun::Perhaps;
        }
        self.say(format!("}} {}", ended(done)));
    }

    fn transaction(&mut self, step: &Step, closure: &Closure) {
        self.say(format!("{step} {{"));
        let (session, depth) = (self.session.clone(), self.depth);
        let mut attempts = 0;
        let done = catch_unwind(AssertUnwindSafe(|| match step {
            Step::Retry(_) => session.retry(2, |_| {
                attempts += 1;
                if attempts > 1 {
                    self.say("} {  once more");
                }
                self.inside(closure, depth + 1)
            }),
            _ => session.transaction(|_| {
                attempts += 1;
                self.inside(closure, depth + 1)
            }),
        }));
        self.depth = depth;
        match attempts {
            0 => self.begun = self.begun.max(Begun::Perhaps),
            _ => self.transaction_ends(),
        }
        self.say(format!("}} {}", ended(done)));
    }
}

fn other_sql(step: &Step) -> String {
    match step {
        Step::OtherUpdate { key: (table, id), n } => {
            let version = if table.is_versioned() { ", version = version + 1" } else { "" };
            format!("UPDATE {} SET n = {n}{version} WHERE id = {id}", table.name())
        }
        Step::OtherDelete((table, id)) => format!("DELETE FROM {} WHERE id = {id}", table.name()),
        Step::OtherInsert(id) => format!("INSERT INTO users (id) VALUES ({id})"),
        _ => unreachable!("a step of the session"),
    }
}

/// Runs a program in a scope of its own.
fn run(shop: &Shop<Conn>, other: &mut OtherConnection, program: &Program, begins: Begins) -> Record {
    assert!(other.write(FIRST_ROWS), "the first rows");
    let record = Rc::new(RefCell::new(Record::default()));
    let scope = match begins {
        Begins::AtFirstWrite => shop.scope(),
        Begins::Eagerly => shop.scope().begin_eagerly(),
    };
    let body = || {
        let session = DB.session()?;
        let record = Rc::clone(&record);
        let mut run = Run {
            session,
            other: &mut *other,
            record,
            begins,
            begun: Begun::No,
            has_failed: false,
            depth: 0,
            hooks: 0,
        };
        run.run(&program.body.steps);
        match program.body.end {
            End::Ok => Ok(()),
            End::Err => Err(Stop::Wanted),
            End::Panic => resume_unwind(Box::new(())),
        }
    };
    let done = catch_unwind(AssertUnwindSafe(|| match program.commits {
        true => scope.run_and_commit(body),
        false => scope.run(body),
    }));
    let mut record = Rc::into_inner(record).expect("the scope has ended").into_inner();
    let memory = memory(&record.handles);
    let how = if program.commits { "that commits" } else { "that does not commit" };
    let read = |(_, handle): &(Key, Handle)| handle.read().map_or_else(|error| shown(&error), |row| told(Some(&row)));
    let handles: Vec<String> = record.handles.iter().map(read).collect();
    let is_of_program = |row: &Stored| matches!(Table::named(&row.name), Table::User | Table::Counter);
    let stored: Vec<Stored> = other.load(&all_rows());
    let mut rows: Vec<String> = stored.iter().filter(|row| is_of_program(row)).map(|row| format!("{row:?}")).collect();
    rows.sort();
    let ends = [
        format!("end of a scope {how}: {}", ended(done)),
        format!("handles after the scope: {}", handles.join("; ")),
        format!("rows after the scope: {}", rows.join("; ")),
    ];
    record.entries.extend(ends.map(|text| Entry { text, memory: memory.clone() }));
    record
}

/// Runs a program in both ways. An error shows the first difference.
fn compare(shop: &Shop<Conn>, other: &mut OtherConnection, program: &Program) -> Result<(), String> {
    let default = run(shop, other, program, Begins::AtFirstWrite);
    difference(&default, &run(shop, other, program, Begins::Eagerly)).map_or(Ok(()), Err)
}

#[test]
fn default_scope_gives_what_an_eager_scope_gives() {
    run_test(setup(&DB, KIND, read_committed).map(|setup| setup.fixture(model_tables())), KIND, |shop| {
        let mut other = shop.other_connection();
        let seed = number("DIESEL_SESSION_MODEL_SEED").unwrap_or(1);
        let config = ProptestConfig { rng_seed: RngSeed::Fixed(seed), ..ProptestConfig::default() };
        let (mut chance, programs) = (TestRunner::new(config), programs());
        for case in 0..cases() {
            let mut tree = programs.new_tree(&mut chance).expect("nothing is rejected");
            let Err(mut reason) = compare(shop, &mut other, &tree.current()) else { continue };
            for _ in 0..SHRINKING_RUNS {
                match compare(shop, &mut other, &tree.current()) {
                    Err(smaller) => {
                        reason = smaller;
                        if !tree.simplify() {
                            break;
                        }
                    }
                    Ok(()) if tree.complicate() => {}
                    Ok(()) => break,
                }
            }
            panic!("program {case} of seed {seed}:{reason}");
        }
        Ok(())
    });
}
