//! The macros of `diesel-session`, which re-exports and documents them.

#![forbid(unsafe_code)]

mod backends;
mod entity;
mod model;
mod new_entity;
mod test;
mod update;
mod words;

use proc_macro::TokenStream;
use syn::{DeriveInput, ItemFn, parse_macro_input};

/// Makes a struct an entity: a row of a table that a `Session` tracks by its key. Derive it beside `Queryable`,
/// `Selectable` and `Clone` on a struct with named fields. Each field is a column. The guide is the documentation of
/// `diesel_session::unit_of_work`.
///
/// | on the struct | |
/// |---|---|
/// | `#[entity(new = NewUser)]` | generates the struct of new rows, with all fields except the `generated` ones and the `version`; foreign keys have the type `Fk<Parent>` |
/// | `#[entity(new_derive(Default, ..))]` | further traits that the struct of new rows derives, beside `Debug`, `Clone` and `Insertable` |
/// | `#[entity(connection = AnyConnection)]` | implements the entity also for this enum of connections; may be repeated |
/// | `#[entity(row_by_row)]` | inserts and updates each row by a statement of its own |
/// | `#[diesel(..)]` | `table_name`, `primary_key`, `belongs_to` and `check_for_backend` have the same meaning as in Diesel |
///
/// | on a field | |
/// |---|---|
/// | `#[entity(generated)]` | the database makes the value, which is read back |
/// | `#[entity(version)]` | an integer that each update compares and increments; `ErrorKind::Stale` if another transaction has changed the row |
/// | `#[entity(references = Parent)]` | a foreign key that no `belongs_to` declares |
/// | `#[diesel(column_name = ..)]` | the same meaning as in Diesel; `embed`, `serialize_as` and `select_expression` are errors |
#[proc_macro_derive(Entity, attributes(entity, diesel))]
pub fn entity(input: TokenStream) -> TokenStream {
    let input = parse_macro_input!(input as DeriveInput);
    entity::derive(&input).unwrap_or_else(|error| error.to_compile_error()).into()
}

/// Makes a struct with `#[derive(Insertable)]` a new row of an entity, for `Session::add`. Use it if the struct that
/// `#[entity(new = ..)]` generates does not fit. The guide is the documentation of `diesel_session::unit_of_work`.
///
/// | on the struct | |
/// |---|---|
/// | `#[entity(User)]` | the entity of the new row; required |
/// | `#[entity(User, key(country, number))]` | the fields of the key, if the program makes the key; without `key`, the database makes it |
/// | `#[entity(User, connection = AnyConnection)]` | implements the new row also for this enum of connections |
/// | `#[entity(User, row_by_row)]` | inserts each row by a statement of its own |
///
/// | on a field | |
/// |---|---|
/// | `#[entity(write_only)]` | the entity has no field of this name; all other fields are compared with the inserted row |
///
/// A foreign key has the type `Fk<Parent>` or `Option<Fk<Parent>>`.
#[proc_macro_derive(NewEntity, attributes(entity, diesel))]
pub fn new_entity(input: TokenStream) -> TokenStream {
    let input = parse_macro_input!(input as DeriveInput);
    new_entity::derive(&input).unwrap_or_else(|error| error.to_compile_error()).into()
}

/// Makes a function a test with an application of its own. The database of the application has the schema of the
/// migrations and no rows. The attribute replaces `#[test]`. The function takes the application (`app: App<C>`) or no
/// argument, and returns any type that a test may return. Other attributes, such as `#[ignore]` and `#[should_panic]`,
/// may stand beside it.
///
/// The first argument is the database object: `#[diesel_session::test(DB)]`. Further arguments may follow in any order:
///
/// | argument | |
/// |---|---|
/// | `isolation = Rollback` | how tests are isolated from each other: `Database`, `Schema`, `Rollback`, or an expression |
/// | `max_size = 2` | maximum number of connections of the application |
/// | `fixtures("users.sql", ..)` | SQL files that are run before the test; the paths are relative to the source file; may be repeated |
/// | `fixture = path::to::function` | a function that is called before the test; may be repeated |
/// | `config = expression` | the configuration of the application |
/// | `warn_repeats = 10` | number of repetitions of a statement from which on the test logs a warning |
/// | `keep = true` | keeps the database of a failed test, and prints where it is |
/// | `template = "base"` | the PostgreSQL database from which the test database is copied before the migrations run |
///
/// Fixtures run in the order in which they are written.
#[proc_macro_attribute]
pub fn test(arguments: TokenStream, function: TokenStream) -> TokenStream {
    let arguments = parse_macro_input!(arguments as test::Arguments);
    let function = parse_macro_input!(function as ItemFn);
    test::expand(&arguments, &function).unwrap_or_else(|error| error.to_compile_error()).into()
}
