//! The macros of `diesel-session`, which re-exports them and documents them.

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

/// Makes a struct an entity: a table's row that a `Session` keeps by its key. It goes beside `#[derive(Queryable, Selectable)]`, on a
/// `Clone` struct with named fields, each a column. The guide is the documentation of `diesel_session::unit_of_work`.
///
/// | on the struct | |
/// |---|---|
/// | `#[entity(new = NewUser)]` | makes the struct of new rows, with all fields but the `generated` ones and the `version`; foreign keys are `Fk<Parent>` |
/// | `#[entity(new_derive(Default, ..))]` | what that derives beside `Debug`, `Clone` and `Insertable` |
/// | `#[entity(connection = AnyConnection)]` | also for this enum of connections; may be given several times |
/// | `#[entity(row_by_row)]` | each new row and each update is a statement of its own |
/// | `#[diesel(..)]` | `table_name`, `primary_key`, `belongs_to` and `check_for_backend` are read as Diesel reads them |
///
/// | on a field | |
/// |---|---|
/// | `#[entity(generated)]` | the database makes it, and it is read back |
/// | `#[entity(version)]` | an integer that each update raises by one and asks for: `Error::Stale` where somebody else was faster |
/// | `#[entity(references = Parent)]` | a foreign key that no `belongs_to` names |
/// | `#[diesel(column_name = ..)]` | as Diesel reads it; `embed`, `serialize_as` and `select_expression` are refused |
#[proc_macro_derive(Entity, attributes(entity, diesel))]
pub fn entity(input: TokenStream) -> TokenStream {
    let input = parse_macro_input!(input as DeriveInput);
    entity::derive(&input).unwrap_or_else(|error| error.to_compile_error()).into()
}

/// Makes a struct with `#[derive(Insertable)]` a new row of an entity, for `Session::add`: where the one that `#[entity(new = ..)]` makes
/// does not fit. The guide is the documentation of `diesel_session::unit_of_work`.
///
/// | on the struct | |
/// |---|---|
/// | `#[entity(User)]` | what it is a new row of; must be there |
/// | `#[entity(User, key(country, number))]` | the fields of the key, where the program makes it; without, the database does |
/// | `#[entity(User, connection = AnyConnection)]` | also for this enum of connections |
/// | `#[entity(User, row_by_row)]` | each new row is a statement of its own |
///
/// | on a field | |
/// |---|---|
/// | `#[entity(write_only)]` | the entity has no field of this name; others are compared with what was inserted |
///
/// A foreign key is an `Fk<Parent>`, or `Option<Fk<Parent>>`.
#[proc_macro_derive(NewEntity, attributes(entity, diesel))]
pub fn new_entity(input: TokenStream) -> TokenStream {
    let input = parse_macro_input!(input as DeriveInput);
    new_entity::derive(&input).unwrap_or_else(|error| error.to_compile_error()).into()
}

/// A test with an application of its own, whose database has the schema of the database object's migrations and nothing else in it.
/// It stands in place of `#[test]`, on a function that takes the application, `app: App<C>`, or nothing, and returns what a test may
/// return. Other attributes, such as `#[ignore]` and `#[should_panic]`, go beside it.
///
/// The first argument is the database object: `#[diesel_session::test(DB)]`. Others may follow it, in any order:
///
/// | argument | |
/// |---|---|
/// | `isolation = Rollback` | how tests are kept apart: `Database`, `Schema`, `Rollback`, or an expression |
/// | `max_size = 2` | how many connections the application may have |
/// | `fixtures("users.sql", ..)` | files of SQL that are run before the test, given relative to the source file; may be repeated |
/// | `fixture = path::to::function` | a function that is called before the test; may be repeated |
/// | `config = expression` | the configuration |
/// | `warn_repeats = 10` | from how many repetitions of a statement on it warns |
/// | `keep = true` | keeps the database of a test that fails, and says where it is |
/// | `template = "base"` | the PostgreSQL database that the test's database is copied from before the migrations run |
///
/// Fixtures are run in the order in which they are written.
#[proc_macro_attribute]
pub fn test(arguments: TokenStream, function: TokenStream) -> TokenStream {
    let arguments = parse_macro_input!(arguments as test::Arguments);
    let function = parse_macro_input!(function as ItemFn);
    test::expand(&arguments, &function).unwrap_or_else(|error| error.to_compile_error()).into()
}
