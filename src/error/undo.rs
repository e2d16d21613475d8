//! The way in which the program undoes a transaction that an error has made useless.

use super::{Details, Error, ErrorKind, SourceLocation};

/// The action by which the program undoes the transaction, at the location at which it gets the error.
///
/// [`Session::rollback`](crate::Session::rollback) is refused inside a closure of `transaction`, `savepoint` or
/// `retry`. In a hook, it would roll back the transaction that was to be committed. In these cases the program returns
/// `Err`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Undo {
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
        at: SourceLocation,
    },
    /// Return `Err` from this closure and then call `rollback()`. The closure is a savepoint, and the transaction
    /// around it has to end.
    ClosureThenRollback {
        /// `transaction` or `savepoint`.
        name: &'static str,
        /// The source location of the call.
        at: SourceLocation,
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
            _ if self == Self::Unsaid => String::new(),
            None => format!("{before}{}", sentence(next)),
            Some((fact, false)) => format!("{before}{fact}. {}", sentence(next)),
            Some((action, true)) => format!("{before}{action}, then {next}."),
        }
    }

    /// A sentence with the action. If it is not empty, it starts with a space.
    pub(super) fn alone(self) -> String {
        self.text().map_or_else(String::new, |(text, _)| format!(" {text}."))
    }

    /// The sentence without its full stop, and whether it asks for an action.
    fn text(self) -> Option<(String, bool)> {
        let action = match self {
            Self::NotNeeded | Self::Unsaid => return None,
            Self::RolledBack => return Some(("The transaction was rolled back".into(), false)),
            Self::SavepointRolledBack => return Some(("What was done in the savepoint was rolled back".into(), false)),
            Self::Rollback => "Call `rollback()`".into(),
            Self::Scope => "Return `Err` from the closure of the scope, or call `rollback()`".into(),
            Self::Closure { name, at } => format!("Return `Err` from the closure of the `{name}` at {at}"),
            Self::ClosureThenRollback { name, at } => {
                format!("Return `Err` from the closure of the `{name}` at {at} and call `rollback()`")
            }
            Self::Hook { name } => format!("Return `Err` from the `{name}` hook, so that its caller rolls back"),
        };
        Some((action, true))
    }
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
        if self.undo().is_none() {
            return;
        }
        let action = match self.details_mut() {
            // The row has to be read again, and a snapshot of the transaction may still show its old values.
            Details::Stale { .. } | Details::ConnectionLost { .. } => undo_of(true),
            Details::Autoflush { source, .. } => {
                source.set_undo(undo_of);
                // The action of `source` is enough.
                if source.undo().is_some() || source.is_rollback_required() {
                    Undo::NotNeeded
                } else {
                    // Unless a statement failed, nothing was sent, so nothing was rolled back.
                    let was_sent = source.kind() == ErrorKind::Query;
                    Some(undo_of(false)).filter(|undo| was_sent || *undo != Undo::RolledBack).unwrap_or_default()
                }
            }
            _ => undo_of(false),
        };
        if let Some(undo) = self.undo() {
            *undo = action;
        }
    }

    /// The action, if the text mentions one.
    fn undo(&mut self) -> Option<&mut Undo> {
        match self.details_mut() {
            Details::Autoflush { undo, .. }
            | Details::ConnectionLost { undo, .. }
            | Details::NotReturned { undo, .. }
            | Details::NotUnique { undo, .. }
            | Details::RowTooLarge { undo, .. }
            | Details::Stale { undo, .. }
            | Details::UnmatchedRows { undo, .. }
            | Details::UnresolvedKeys { undo, .. } => Some(undo),
            _ => None,
        }
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
