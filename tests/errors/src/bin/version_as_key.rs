//~ error: a key is no version
use diesel::prelude::*;
use diesel_session::Entity;
use errors::schema::users;

#[derive(Debug, Clone, Queryable, Selectable, Entity)]
#[diesel(table_name = users)]
pub struct User {
    #[entity(version)]
    pub id: i32,
    pub name: String,
}

fn main() {}
