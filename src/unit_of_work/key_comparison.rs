//! The comparison of keys. The database decides which keys are equal, and may regard keys as equal that differ in Rust.

use std::any::type_name;
use std::collections::HashMap;
use std::fmt;

use super::entity::Entity;

/// The rows of these keys, in the order of the keys. A row may come back with another spelling of its key than the
/// requested one. If so, the keys without a row are queried again in halves, until each row is assigned to its key.
pub(super) fn find_by_keys<T: Entity, E>(
    ids: &[T::Id],
    mut find: impl FnMut(&[T::Id]) -> Result<Vec<T>, E>,
) -> Result<Vec<Option<T>>, E> {
    if let [_] = ids {
        return Ok(vec![find(ids)?.pop()]);
    }
    let mut rows: HashMap<T::Id, T> = find(ids)?.into_iter().map(|row| (row.id(), row)).collect();
    let mut found: Vec<Option<T>> = ids.iter().map(|id| rows.remove(id)).collect();
    let missing: Vec<usize> = (0..ids.len()).filter(|&index| found[index].is_none()).collect();
    if missing.is_empty() || is_exact::<T::Id>() {
        return Ok(found);
    }
    let mut unassigned = vec![missing];
    while let Some(mut indices) = unassigned.pop() {
        let requested: Vec<T::Id> = indices.iter().map(|&index| ids[index].clone()).collect();
        let mut rows = find(&requested)?;
        if let [index] = indices[..] {
            found[index] = rows.pop();
        } else if !rows.is_empty() {
            let half = indices.split_off(indices.len() / 2);
            unassigned.extend([indices, half]);
        }
    }
    Ok(found)
}

/// Whether every database compares keys of this type as Rust does.
pub(super) fn is_exact<Id>() -> bool {
    matches!(type_name::<Id>(), "i16" | "i32" | "i64" | "u8" | "u16" | "u32" | "u64" | "uuid::Uuid")
}

/// A key without letter case and blanks, which a database may ignore in comparisons. Keys that the database regards as
/// equal have the same normalized key. Other keys may share it.
pub(super) fn normalized_key(key: &impl fmt::Debug) -> String {
    let mut text = format!("{key:?}").to_lowercase();
    text.retain(|c| c != ' ');
    text
}
