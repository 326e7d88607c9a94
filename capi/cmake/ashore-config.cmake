# find_package(ashore): the targets ashore::ashore, the shared library, and ashore::static. Lies in
# <prefix>/share/ashore/cmake, or in another directory three levels below the prefix.
get_filename_component(_ashore_prefix "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
foreach(_ashore_lib "lib/${CMAKE_LIBRARY_ARCHITECTURE}" lib64 lib)
  set(_ashore_shared "${_ashore_prefix}/${_ashore_lib}/libashore.so")
  set(_ashore_static "${_ashore_prefix}/${_ashore_lib}/libashore.a")
  if(NOT TARGET ashore::ashore AND EXISTS "${_ashore_shared}")
    add_library(ashore::ashore SHARED IMPORTED)
    set_target_properties(ashore::ashore PROPERTIES
      IMPORTED_LOCATION "${_ashore_shared}" IMPORTED_SONAME "libashore.so.1"
      INTERFACE_INCLUDE_DIRECTORIES "${_ashore_prefix}/include")
  endif()
  if(NOT TARGET ashore::static AND EXISTS "${_ashore_static}")
    add_library(ashore::static STATIC IMPORTED)
    set_target_properties(ashore::static PROPERTIES
      IMPORTED_LOCATION "${_ashore_static}" INTERFACE_LINK_LIBRARIES "pthread;m;${CMAKE_DL_LIBS}"
      INTERFACE_INCLUDE_DIRECTORIES "${_ashore_prefix}/include")
  endif()
endforeach()
if(NOT TARGET ashore::ashore AND NOT TARGET ashore::static)
  set(ashore_FOUND FALSE)
  set(ashore_NOT_FOUND_MESSAGE "no libashore.so and no libashore.a below ${_ashore_prefix}")
endif()
