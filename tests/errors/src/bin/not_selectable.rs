//~ error[E0277]: the trait bound `User: Selectable<diesel::sqlite::Sqlite>` is not satisfied
use diesel::prelude::*;
use diesel_session::Entity;
use errors::schema::users;

#[derive(Debug, Clone, Queryable, Entity)]
#[diesel(table_name = users)]
pub struct User {
    pub id: i32,
    pub name: String,
}

fn main() {}
