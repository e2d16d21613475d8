//! Random scopes: the steps of the session, and the writes of another connection between two of the steps.

use std::fmt;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

use crate::unit_model::rows::Table;

pub type Key = (Table, i32);

/// A table without rows: the database refuses the statement. A column that is NULL: Diesel refuses the row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailingRead {
    OfNoTable,
    OfNull,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HookOf {
    BeforeCommit,
    AfterCommit,
    AfterRollback,
}

#[derive(Debug, Clone)]
pub enum Step {
    Count(Table),
    Load(Table),
    /// A SELECT with a function of the program.
    Call(Table),
    Get(Key),
    Find(Key),
    Track(Table),
    Read(Key),
    Refresh(Key),
    Expire(Key),
    Fail(FailingRead),
    Write {
        key: Key,
        n: i32,
    },
    WriteCode {
        id: i32,
        code: i32,
    },
    Add {
        id: i32,
        code: i32,
    },
    Delete(Key),
    Update {
        key: Key,
        n: i32,
    },
    Insert {
        id: i32,
        code: i32,
    },
    RawUpdate {
        key: Key,
        n: i32,
    },
    Flush,
    OtherUpdate {
        key: Key,
        n: i32,
    },
    OtherDelete(Key),
    OtherInsert(i32),
    Hook(HookOf),
    Savepoint(Closure),
    Transaction(Closure),
    Retry(Closure),
    Begin,
    Commit,
    Rollback,
}

/// How a closure or a scope ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Ok,
    Err,
    Panic,
}

#[derive(Debug, Clone)]
pub struct Closure {
    pub steps: Vec<Step>,
    pub end: End,
}

#[derive(Debug, Clone)]
pub struct Program {
    pub body: Closure,
    /// Whether the scope commits if its closure returns `Ok`.
    pub commits: bool,
}

/// The step as the report of a failure shows it. A closure is shown without its steps, which have lines of their own.
impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |key: &Key| format!("{} {}", key.0.name(), key.1);
        match self {
            Self::Count(table) => write!(f, "count {}", table.name()),
            Self::Load(table) => write!(f, "load {}", table.name()),
            Self::Call(table) => write!(f, "load abs(n) of {}", table.name()),
            Self::Get(key) => write!(f, "get {}", name(key)),
            Self::Find(key) => write!(f, "find {}", name(key)),
            Self::Track(table) => write!(f, "track {}", table.name()),
            Self::Read(key) => write!(f, "read the handle of {}", name(key)),
            Self::Refresh(key) => write!(f, "refresh {}", name(key)),
            Self::Expire(key) => write!(f, "expire {}", name(key)),
            Self::Fail(FailingRead::OfNoTable) => write!(f, "load a table that does not exist"),
            Self::Fail(FailingRead::OfNull) => write!(f, "load a NULL as a number"),
            Self::Write { key, n } => write!(f, "write n + {n} to the handle of {}", name(key)),
            Self::WriteCode { id, code } => write!(f, "write code {code} to the handle of users {id}"),
            Self::Add { id, code } => write!(f, "add users {id} with code {code}"),
            Self::Delete(key) => write!(f, "delete the handle of {}", name(key)),
            Self::Update { key, n } => write!(f, "UPDATE {}, n = n + {n}", name(key)),
            Self::Insert { id, code } => write!(f, "INSERT users {id} with code {code}"),
            Self::RawUpdate { key, n } => write!(f, "raw UPDATE {}, n = n + {n}", name(key)),
            Self::Flush => write!(f, "flush"),
            Self::OtherUpdate { key, n } => write!(f, "another connection: UPDATE {}, n = {n}", name(key)),
            Self::OtherDelete(key) => write!(f, "another connection: DELETE {}", name(key)),
            Self::OtherInsert(id) => write!(f, "another connection: INSERT users {id}"),
            Self::Hook(hook) => write!(f, "register {hook:?}"),
            Self::Savepoint(_) => write!(f, "savepoint"),
            Self::Transaction(_) => write!(f, "transaction"),
            Self::Retry(_) => write!(f, "retry"),
            Self::Begin => write!(f, "begin"),
            Self::Commit => write!(f, "commit"),
            Self::Rollback => write!(f, "rollback"),
        }
    }
}

pub fn programs() -> impl Strategy<Value = Program> {
    let end = prop_oneof![6 => Just(End::Ok), 1 => Just(End::Err), 1 => Just(End::Panic)];
    // Programs that only read, for the hooks and the rows of a scope whose transaction never begins.
    let ends = prop_oneof![3 => Just(Step::Commit), 2 => Just(Step::Rollback)];
    let reading = prop_oneof![8 => read(), 3 => other(), 3 => hook(), 2 => ends];
    let steps = prop_oneof![3 => vec(step(), 1..14), 1 => vec(reading, 1..10)];
    (steps, end, prop::bool::weighted(0.6))
        .prop_map(|(steps, end, commits)| Program { body: Closure { steps, end }, commits })
}

fn step() -> impl Strategy<Value = Step> {
    let closure = |inner: BoxedStrategy<Step>| {
        let end = prop_oneof![4 => Just(End::Ok), 2 => Just(End::Err), 1 => Just(End::Panic)];
        (vec(inner, 0..5), end).prop_map(|(steps, end)| Closure { steps, end }).boxed()
    };
    let nested = closure(flat().boxed()).prop_map(Step::Savepoint);
    let inner = closure(prop_oneof![7 => flat(), 1 => nested].boxed());
    prop_oneof![
        24 => flat(),
        3 => inner.clone().prop_map(Step::Savepoint),
        1 => inner.clone().prop_map(Step::Transaction),
        1 => inner.prop_map(Step::Retry),
        1 => Just(Step::Begin),
        3 => Just(Step::Commit),
        2 => Just(Step::Rollback),
    ]
}

fn flat() -> impl Strategy<Value = Step> + Clone {
    prop_oneof![6 => read(), 4 => write(), 3 => other(), 1 => hook()]
}

fn table() -> impl Strategy<Value = Table> + Clone {
    select(&[Table::User, Table::Counter][..])
}

/// Few rows and few values, so that the steps meet.
fn key() -> impl Strategy<Value = Key> + Clone {
    (table(), 1..4)
}

fn read() -> impl Strategy<Value = Step> + Clone {
    prop_oneof![
        2 => table().prop_map(Step::Count),
        3 => table().prop_map(Step::Load),
        5 => key().prop_map(Step::Get),
        2 => key().prop_map(Step::Find),
        2 => table().prop_map(Step::Track),
        3 => key().prop_map(Step::Read),
        1 => key().prop_map(Step::Refresh),
        1 => key().prop_map(Step::Expire),
        1 => select(&[FailingRead::OfNoTable, FailingRead::OfNull][..]).prop_map(Step::Fail),
    ]
}

fn write() -> impl Strategy<Value = Step> + Clone {
    prop_oneof![
        5 => (key(), 1..3).prop_map(|(key, n)| Step::Write { key, n }),
        1 => (1..4, 1..4).prop_map(|(id, code)| Step::WriteCode { id, code }),
        2 => (1..4, 1..5).prop_map(|(id, code)| Step::Add { id, code }),
        1 => key().prop_map(Step::Delete),
        2 => (key(), 1..3).prop_map(|(key, n)| Step::Update { key, n }),
        1 => (1..4, 1..5).prop_map(|(id, code)| Step::Insert { id, code }),
        1 => (key(), 1..3).prop_map(|(key, n)| Step::RawUpdate { key, n }),
        1 => table().prop_map(Step::Call),
        2 => Just(Step::Flush),
    ]
}

fn other() -> impl Strategy<Value = Step> + Clone {
    prop_oneof![
        5 => (key(), 10..20).prop_map(|(key, n)| Step::OtherUpdate { key, n }),
        1 => key().prop_map(Step::OtherDelete),
        1 => (1..4).prop_map(Step::OtherInsert),
    ]
}

fn hook() -> impl Strategy<Value = Step> + Clone {
    select(&[HookOf::BeforeCommit, HookOf::AfterCommit, HookOf::AfterRollback][..]).prop_map(Step::Hook)
}
