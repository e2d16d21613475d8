//! The way in which the program undoes a transaction that an error has made useless.

use super::{Error, Place};

/// The action by which the program undoes the transaction, at the location at which it gets the error.
///
/// [`Session::rollback`](crate::Session::rollback) is refused inside a closure of `transaction`, `savepoint` or
/// `retry`. In a hook, it would roll back the transaction that was to be committed. In these cases the program returns
/// `Err`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Undo {
    /// No action: the error has changed nothing.
    #[default]
    NotNeeded,
    /// The text does not mention an action, because another error quotes it and mentions one.
    Unsaid,
    /// No action: the transaction was rolled back.
    RolledBack,
    /// No action: the savepoint was rolled back, and the transaction goes on.
    SavepointRolledBack,
    /// Call `rollback()`.
    Rollback,
    /// Return `Err` from the closure of a scope that commits, or call `rollback()`.
    Scope,
    /// Return `Err` from this closure.
    Closure {
        /// `transaction`, `savepoint` or `retry`.
        name: &'static str,
        /// The source location of the call.
        at: Place,
    },
    /// Return `Err` from this closure and then call `rollback()`. The closure is a savepoint, and the transaction
    /// around it has to end.
    ClosureThenRollback {
        /// `transaction` or `savepoint`.
        name: &'static str,
        /// The source location of the call.
        at: Place,
    },
    /// Return `Err` from this hook.
    Hook {
        /// The kind of hook.
        name: &'static str,
    },
}

impl Undo {
    /// A sentence with the action and then the `next` step. If it is not empty, it starts with `before`.
    pub(super) fn then(self, before: &str, next: &str) -> String {
        match self.text() {
            UndoText::Nothing if self == Self::Unsaid => String::new(),
            UndoText::Nothing => format!("{before}{}", sentence(next)),
            UndoText::Fact(fact) => format!("{before}{fact}. {}", sentence(next)),
            UndoText::Action(action) => format!("{before}{action}, then {next}."),
        }
    }

    /// A sentence with the action. If it is not empty, it starts with a space.
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

/// The phrase as a sentence.
fn sentence(phrase: &str) -> String {
    let mut chars = phrase.chars();
    let first = chars.next().map(char::to_uppercase).into_iter().flatten();
    first.chain(chars).chain(['.']).collect()
}

impl Error {
    /// Sets the action. The argument of `undo_of` is whether the whole transaction has to end.
    pub(crate) fn set_undo(&mut self, undo_of: &dyn Fn(bool) -> Undo) {
        match self {
            // The row has to be read again, and a snapshot of the transaction may still show its old values.
            Self::Stale { undo, .. } | Self::ConnectionLost { undo, .. } => *undo = undo_of(true),
            Self::Unpaired { undo, .. }
            | Self::NotReturned { undo, .. }
            | Self::NotUnique { undo, .. }
            | Self::RowTooLarge { undo, .. }
            | Self::UnresolvedKeys { undo, .. } => *undo = undo_of(false),
            Self::Autoflush { source, undo, .. } => {
                source.set_undo(undo_of);
                *undo = match &**source {
                    // The action of `source` is enough.
                    source if source.mentions_undo() => Undo::NotNeeded,
                    Self::Query { .. } => undo_of(false),
                    // Nothing was sent, so nothing was rolled back.
                    _ => Some(undo_of(false)).filter(|undo| *undo != Undo::RolledBack).unwrap_or_default(),
                };
            }
            _ => {}
        }
    }

    /// Whether the text mentions the action.
    fn mentions_undo(&self) -> bool {
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
    fn undo_text_is_a_sentence_with_or_without_a_next_step() {
        let at = std::panic::Location::caller();
        let closure = Undo::Closure { name: "retry", at };
        assert_eq!(Undo::NotNeeded.then("", "look again"), "Look again.");
        assert_eq!(Undo::RolledBack.then("", "`get` it"), "The transaction was rolled back. `get` it.");
        assert_eq!(Undo::Rollback.then(" ", "`get` it"), " Call `rollback()`, then `get` it.");
        assert_eq!(closure.alone(), format!(" Return `Err` from the closure of the `retry` at {at}."));
        assert_eq!(Undo::NotNeeded.alone(), "");
    }
}
