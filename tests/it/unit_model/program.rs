//! Random programs.

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;

use super::rows::{Column, Table};

/// What the program's scope is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScopeOf {
    Default,
    Autocommit,
    Serializable,
}

/// One of the rows of a table, by its place among those that there are.
#[derive(Debug, Clone, Copy)]
pub struct Pick {
    pub table: Table,
    pub place: usize,
    /// Get it anew, even if there is a handle.
    pub is_found: bool,
}

/// How a column is written.
#[derive(Debug, Clone, Copy)]
pub enum Value {
    Of(i32),
    /// `handle.update(|row| row.n += 1)`
    Update,
    /// `handle.write().n = handle.read().n + 1`
    Read,
}

#[derive(Debug, Clone)]
pub enum Step {
    Add {
        table: Table,
        key: i32,
        parent: usize,
        code: i32,
    },
    Find(Pick),
    Track(Table),
    Lock(Pick),
    Refresh(Pick),
    Write {
        pick: Pick,
        column: Column,
        value: Value,
    },
    Delete(Pick),
    RawUpdate {
        pick: Pick,
        value: i32,
        is_text: bool,
    },
    RawDelete {
        pick: Pick,
    },
    OtherUpdate {
        pick: Pick,
        column: Column,
        value: i32,
    },
    OtherDelete(Pick),
    Flush,
    /// Every row is found by its key.
    FindAll,
    Savepoint(Closure),
    Transaction(Closure),
    Retry(Closure),
    Begin,
    Commit,
    Rollback,
}

/// What runs in a closure, and whether it returns `Ok`.
#[derive(Debug, Clone)]
pub struct Closure {
    pub steps: Vec<Step>,
    pub is_kept: bool,
}

#[derive(Debug, Clone)]
pub struct Program {
    pub scope: ScopeOf,
    pub steps: Vec<Step>,
}

/// Programs that are smaller by a step, a closure or a value; the smallest first.
pub fn smaller(program: &Program) -> Vec<Program> {
    let of = |steps| Program { steps, ..*program };
    smaller_lists(&program.steps).into_iter().map(of).collect()
}

fn smaller_lists(steps: &[Step]) -> Vec<Vec<Step>> {
    let mut lists = Vec::new();
    let mut replace = |from: usize, to: usize, with: &[Step]| lists.push([&steps[..from], with, &steps[to..]].concat());
    let mut length = steps.len() / 2;
    while length > 0 {
        (0..=steps.len() - length).rev().for_each(|from| replace(from, from + length, &[]));
        length /= 2;
    }
    for (place, step) in steps.iter().enumerate() {
        if let Some(Closure { steps, .. }) = step.closure() {
            replace(place, place + 1, steps);
            for steps in smaller_lists(steps) {
                let mut smaller = step.clone();
                if let Some(closure) = smaller.closure_mut() {
                    closure.steps = steps;
                }
                replace(place, place + 1, &[smaller]);
            }
        }
        step.simpler().into_iter().for_each(|step| replace(place, place + 1, &[step]));
    }
    lists
}

impl Step {
    fn closure(&self) -> Option<&Closure> {
        match self {
            Self::Savepoint(closure) | Self::Transaction(closure) | Self::Retry(closure) => Some(closure),
            _ => None,
        }
    }

    fn closure_mut(&mut self) -> Option<&mut Closure> {
        match self {
            Self::Savepoint(closure) | Self::Transaction(closure) | Self::Retry(closure) => Some(closure),
            _ => None,
        }
    }

    fn simpler(&self) -> Vec<Self> {
        match self {
            Self::FindAll => Table::ALL.into_iter().map(Self::Track).chain([Self::Flush]).collect(),
            Self::Track(table) => {
                let pick = |place| Pick { table: *table, place, is_found: true };
                (0..3).map(|place| Self::Find(pick(place))).collect()
            }
            Self::Commit => vec![Self::Flush],
            Self::Transaction(closure) => vec![Self::Savepoint(closure.clone())],
            Self::Write { pick, column, value: Value::Update | Value::Read } => {
                vec![Self::Write { pick: *pick, column: *column, value: Value::Of(1) }]
            }
            _ => Vec::new(),
        }
    }
}

/// Tables that a program uses: few of them, so that its steps meet.
const TABLES: [&[Table]; 8] = [
    &[Table::Counter],
    &[Table::Node],
    &[Table::Link],
    &[Table::User],
    &[Table::User, Table::Badge],
    &[Table::User, Table::Post],
    &[Table::User, Table::Comment, Table::Post],
    &Table::ALL,
];

pub fn programs() -> impl Strategy<Value = Program> {
    let scope = prop_oneof![
        4 => Just(ScopeOf::Default),
        2 => Just(ScopeOf::Autocommit),
        2 => Just(ScopeOf::Serializable),
    ];
    (scope, select(&TABLES[..])).prop_flat_map(|(scope, tables)| {
        let part = prop_oneof![3 => step(tables).prop_map(|step| vec![step]), 1 => pattern(tables)];
        vec(part, 1..12).prop_map(move |parts| Program { scope, steps: parts.concat() })
    })
}

fn pick(tables: &'static [Table]) -> impl Strategy<Value = Pick> + Clone {
    (select(tables), 0..3_usize, any::<bool>()).prop_map(|(table, place, is_found)| Pick { table, place, is_found })
}

fn column() -> impl Strategy<Value = Column> + Clone {
    prop_oneof![3 => Just(Column::N), 1 => Just(Column::M), 2 => Just(Column::Parent), 2 => Just(Column::Code)]
}

/// Steps that belong together, which chance alone would rarely bring together.
fn pattern(tables: &'static [Table]) -> impl Strategy<Value = Vec<Step>> {
    let end = prop_oneof![Just(Step::Flush), Just(Step::Commit), Just(Step::FindAll)];
    let pick = pick(tables);
    let write = |pick: Pick, value: Value| Step::Write { pick, column: Column::N, value };
    // One row gives up its code and another one takes it.
    let hand_over = (pick.clone(), 0..4, 1..5, 0..4_usize, 0..3, any::<bool>()).prop_map(
        |(pick, new, key, parent, code, is_deleted)| {
            let value = Value::Of(new);
            let free = match is_deleted {
                false => Step::Write { pick, column: Column::Code, value },
                true => Step::Delete(pick),
            };
            vec![free, Step::Add { table: pick.table, key, parent, code }]
        },
    );
    // Several rows of a table are deleted, and perhaps a reference is cleared.
    let clear = option::of((pick.clone(), 0..4).prop_map(|(pick, place)| Step::Write {
        pick,
        column: Column::Parent,
        value: Value::Of(place),
    }));
    let deletes = (clear, pick.clone(), vec(0..3_usize, 1..4)).prop_map(|(clear, pick, places)| {
        let deletes = places.into_iter().map(|place| Step::Delete(Pick { place, ..pick }));
        clear.into_iter().chain(deletes).collect()
    });
    // A row is written or moved, one that may be its parent is deleted, and a third one is written or added.
    let third = prop_oneof![
        pick.clone().prop_map(move |pick| write(pick, Value::Update)),
        (select(tables), 1..5, 0..4).prop_map(|(table, key, code)| Step::Add { table, key, parent: 0, code }),
    ];
    let first = (pick.clone(), prop_oneof![Just(Column::N), Just(Column::Parent)], 0..3);
    let first = first.prop_map(|(pick, column, value)| Step::Write { pick, column, value: Value::Of(value) });
    let family = (first, pick.clone(), third).prop_map(|(first, gone, third)| vec![first, Step::Delete(gone), third]);
    // Another connection writes a row that the program has read before.
    let between = prop_oneof![
        3 => Just(Some(Step::Commit)),
        1 => Just(Some(Step::Rollback)),
        1 => Just(None),
    ];
    let value = prop_oneof![2 => (0..3).prop_map(Value::Of), 1 => Just(Value::Update), 1 => Just(Value::Read)];
    let how = prop_oneof![Just(0), Just(1), Just(2), Just(3), Just(4)];
    let met = (pick, between, 0..3, value, how).prop_map(move |(pick, between, other, value, how)| {
        let update = Step::OtherUpdate { pick, column: Column::N, value: other };
        let known = Pick { is_found: false, ..pick };
        let elsewhere = Pick { place: pick.place + 1, ..pick };
        let closure = |steps: Vec<Step>, is_kept: bool| Closure { steps, is_kept };
        let written = match how {
            0 => vec![update, write(known, value)],
            1 => vec![update, Step::Lock(pick), write(known, value)],
            2 => vec![
                Step::Savepoint(closure(vec![Step::RawUpdate { pick, value: other, is_text: true }], false)),
                write(known, value),
            ],
            3 => vec![Step::Retry(closure(vec![Step::Find(elsewhere), update, write(known, value)], true))],
            _ => vec![update, Step::Transaction(closure(vec![Step::Find(pick), write(known, value)], true))],
        };
        std::iter::once(Step::Find(pick)).chain(between).chain(written).collect::<Vec<_>>()
    });
    let steps = prop_oneof![hand_over, deletes, family, met];
    (steps, option::weighted(0.8, end)).prop_map(|(steps, end)| steps.into_iter().chain(end).collect())
}

fn step(tables: &'static [Table]) -> impl Strategy<Value = Step> {
    let flat = flat(tables).boxed();
    let closure = |inner: BoxedStrategy<Step>| {
        (vec(inner, 0..6), prop::bool::weighted(0.6)).prop_map(|(steps, is_kept)| Closure { steps, is_kept }).boxed()
    };
    let inner = closure(prop_oneof![6 => flat.clone(), 1 => closure(flat.clone()).prop_map(Step::Savepoint)].boxed());
    prop_oneof![
        20 => flat,
        2 => inner.clone().prop_map(Step::Savepoint),
        1 => inner.clone().prop_map(Step::Transaction),
        2 => inner.prop_map(Step::Retry),
        1 => Just(Step::Begin),
        3 => Just(Step::Commit),
        1 => Just(Step::Rollback),
    ]
}

fn flat(tables: &'static [Table]) -> impl Strategy<Value = Step> + Clone {
    let pick = pick(tables);
    let value = prop_oneof![4 => (0..3).prop_map(Value::Of), 2 => Just(Value::Update), 1 => Just(Value::Read)];
    prop_oneof![
        4 => (select(tables), 1..5, 0..4_usize, 0..4)
            .prop_map(|(table, key, parent, code)| Step::Add { table, key, parent, code }),
        3 => pick.clone().prop_map(Step::Find),
        1 => select(tables).prop_map(Step::Track),
        1 => pick.clone().prop_map(Step::Lock),
        1 => pick.clone().prop_map(Step::Refresh),
        8 => (pick.clone(), column(), value).prop_map(|(pick, column, value)| Step::Write { pick, column, value }),
        4 => pick.clone().prop_map(Step::Delete),
        1 => (pick.clone(), 0..3, any::<bool>())
            .prop_map(|(pick, value, is_text)| Step::RawUpdate { pick, value, is_text }),
        1 => pick.clone().prop_map(|pick| Step::RawDelete { pick }),
        5 => (pick.clone(), column(), 0..3)
            .prop_map(|(pick, column, value)| Step::OtherUpdate { pick, column, value }),
        1 => pick.prop_map(Step::OtherDelete),
        2 => Just(Step::Flush),
        1 => Just(Step::FindAll),
    ]
}
