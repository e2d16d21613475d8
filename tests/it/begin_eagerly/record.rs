//! What a run of a program has done, and the difference between two runs.

use diesel_session::unit_of_work::RowState;

use super::program::Key;
use super::*;
use crate::unit_model::handles::Handle;
use crate::unit_model::rows::told;

/// One line of the report, and the state of all handles after it.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    pub text: String,
    pub memory: String,
}

/// What a run has done. It outlives a panic of the scope.
#[derive(Default)]
pub struct Record {
    pub entries: Vec<Entry>,
    pub handles: Vec<(Key, Handle)>,
    /// The first step that was inside of a transaction and should have been outside, or the other way round: what is
    /// wrong, and the number of the entries before that.
    wrong: Option<(String, usize)>,
}

impl Record {
    pub fn note_wrong(&mut self, what: String) {
        let entries = self.entries.len();
        self.wrong.get_or_insert((what, entries));
    }
}

/// Why a closure ends without `Ok`.
pub enum Stop {
    Failed(Error),
    Wanted,
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

pub fn memory(handles: &[(Key, Handle)]) -> String {
    let handle = |((table, id), handle): &(Key, Handle)| {
        let row = match handle.state() {
            // To read an expired row would be a statement.
            RowState::Persistent => handle.read().map_or_else(|error| shown(&error), |row| told(Some(&row))),
            _ => String::new(),
        };
        format!("{} {id} {:?} {row}", table.name(), handle.state())
    };
    handles.iter().map(handle).collect::<Vec<_>>().join("; ")
}

pub fn shown(error: &Error) -> String {
    kind_of(error).map_or_else(|| format!("{:?}", error.kind()), |kind| format!("{:?} {kind:?}", error.kind()))
}

/// A result as the report shows it.
pub type Shown = Result<String, String>;

pub fn result_of<T: std::fmt::Debug>(result: Result<T>) -> Shown {
    result.map(|value| format!("{value:?}")).map_err(|error| shown(&error))
}

pub fn ended(done: std::thread::Result<Result<(), Stop>>) -> String {
    match done {
        Ok(Ok(())) => "Ok".into(),
        Ok(Err(Stop::Failed(error))) => shown(&error),
        Ok(Err(Stop::Wanted)) => "Err of the program".into(),
        Err(_) => "panic".into(),
    }
}

/// The difference between a default and an eager run, after the steps that were the same.
pub fn difference(default: &Record, eager: &Record) -> Option<String> {
    let steps = |entries: &[Entry]| entries.iter().map(|entry| format!("\n    {}", entry.text)).collect::<String>();
    for run in [default, eager] {
        if let Some((wrong, before)) = &run.wrong {
            return Some(format!("{}\n{wrong}", steps(&run.entries[..*before])));
        }
    }
    let same = default.entries.iter().zip(&eager.entries).take_while(|(default, eager)| default == eager).count();
    if same == default.entries.len().max(eager.entries.len()) {
        return None;
    }
    let next = |run: &Record| match run.entries.get(same) {
        Some(Entry { text, memory }) => format!("{text}\n            [{memory}]"),
        None => "    nothing".into(),
    };
    let (steps, default, eager) = (steps(&default.entries[..same]), next(default), next(eager));
    Some(format!("{steps}\n  default:\n    {default}\n  begin_eagerly:\n    {eager}"))
}
