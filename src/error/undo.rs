//! How the program undoes a transaction that an error has made useless.

use super::{Error, Place};

/// UndoText the program has to do, at the place at which it got an error, so that what the transaction has done is undone.
///
/// [`Session::rollback`](crate::Session::rollback) is refused inside of a closure of `transaction`, `savepoint` and `retry`, and in a
/// hook it takes away what was to be committed. There the program returns `Err`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Undo {
    /// Nothing: the error has changed nothing.
    #[default]
    NotNeeded,
    /// The text says nothing of it, as it is quoted by another that does.
    Unsaid,
    /// Nothing: the transaction has been rolled back.
    RolledBack,
    /// Nothing: what was done in the savepoint has been rolled back, and the transaction goes on.
    SavepointRolledBack,
    /// Call `rollback()`.
    Rollback,
    /// Return `Err` from the closure of a scope that commits, or call `rollback()`.
    Scope,
    /// Return `Err` from this closure.
    Closure {
        /// `transaction`, `savepoint` or `retry`.
        name: &'static str,
        /// Where that was called.
        at: Place,
    },
    /// Return `Err` from this closure, and then call `rollback()`: it is a savepoint, and the transaction around it has to end.
    ClosureThenRollback {
        /// `transaction` or `savepoint`.
        name: &'static str,
        /// Where that was called.
        at: Place,
    },
    /// Return `Err` from this hook.
    Hook {
        /// Which kind of hook.
        name: &'static str,
    },
}

impl Undo {
    /// A sentence on what undoes the transaction, with what is to be done `next`. It stands behind `before`, if it is not empty.
    pub(super) fn then(self, before: &str, next: &str) -> String {
        match self.text() {
            UndoText::Nothing if self == Self::Unsaid => String::new(),
            UndoText::Nothing => format!("{before}{}", sentence(next)),
            UndoText::Fact(fact) => format!("{before}{fact}. {}", sentence(next)),
            UndoText::Action(action) => format!("{before}{action}, then {next}."),
        }
    }

    /// The same without anything next; it is empty if nothing has to be text. It begins with a blank.
    pub(super) fn alone(self) -> String {
        match self.text() {
            UndoText::Nothing => String::new(),
            UndoText::Fact(text) => format!(" {text}."),
            UndoText::Action(text) => format!(" {text}."),
        }
    }

    fn text(self) -> UndoText {
        match self {
            Self::NotNeeded | Self::Unsaid => UndoText::Nothing,
            Self::RolledBack => UndoText::Fact("The transaction was rolled back"),
            Self::SavepointRolledBack => UndoText::Fact("What was done in the savepoint was rolled back"),
            Self::Rollback => UndoText::Action("Call `rollback()`".into()),
            Self::Scope => UndoText::Action("Return `Err` from the closure of the scope, or call `rollback()`".into()),
            Self::Closure { name, at } => {
                UndoText::Action(format!("Return `Err` from the closure of the `{name}` at {at}"))
            }
            Self::ClosureThenRollback { name, at } => {
                UndoText::Action(format!("Return `Err` from the closure of the `{name}` at {at} and call `rollback()`"))
            }
            Self::Hook { name } => {
                UndoText::Action(format!("Return `Err` from the `{name}` hook, so that its caller rolls back"))
            }
        }
    }
}

enum UndoText {
    Nothing,
    Fact(&'static str),
    Action(String),
}

/// A phrase as a sentence of its own.
fn sentence(phrase: &str) -> String {
    let mut chars = phrase.chars();
    let first = chars.next().map(char::to_uppercase).into_iter().flatten();
    first.chain(chars).chain(['.']).collect()
}

impl Error {
    /// Puts in what the program has to do. `undo` is asked whether the whole transaction has to end.
    pub(crate) fn set_undo(&mut self, undo_of: &dyn Fn(bool) -> Undo) {
        match self {
            // A row has to be read again, and what a transaction reads may be of its beginning.
            Self::Stale { undo, .. } | Self::ConnectionLost { undo, .. } => *undo = undo_of(true),
            Self::Unpaired { undo, .. }
            | Self::NotReturned { undo, .. }
            | Self::NotUnique { undo, .. }
            | Self::RowTooLarge { undo, .. }
            | Self::UnresolvedKeys { undo, .. } => *undo = undo_of(false),
            Self::Autoflush { source, undo, .. } => {
                source.set_undo(undo_of);
                *undo = match &**source {
                    // Its own advice is enough.
                    source if source.tells_undo() => Undo::NotNeeded,
                    Self::Query { .. } => undo_of(false),
                    // Nothing was sent, so there was nothing to roll back.
                    _ => Some(undo_of(false)).filter(|undo| *undo != Undo::RolledBack).unwrap_or_default(),
                };
            }
            _ => {}
        }
    }

    /// Whether the text says what undoes the transaction.
    fn tells_undo(&self) -> bool {
        matches!(
            self,
            Self::RollbackRequired { .. }
                | Self::Stale { .. }
                | Self::ConnectionLost { .. }
                | Self::Unpaired { .. }
                | Self::NotReturned { .. }
                | Self::NotUnique { .. }
                | Self::RowTooLarge { .. }
                | Self::UnresolvedKeys { .. }
                | Self::Autoflush { .. }
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_is_a_sentence_whatever_comes_next() {
        let at = std::panic::Location::caller();
        let closure = Undo::Closure { name: "retry", at };
        assert_eq!(Undo::NotNeeded.then("", "look again"), "Look again.");
        assert_eq!(Undo::RolledBack.then("", "`get` it"), "The transaction was rolled back. `get` it.");
        assert_eq!(Undo::Rollback.then(" ", "`get` it"), " Call `rollback()`, then `get` it.");
        assert_eq!(closure.alone(), format!(" Return `Err` from the closure of the `retry` at {at}."));
        assert_eq!(Undo::NotNeeded.alone(), "");
    }
}
