# The CMake package: find_package(moerun), then moerun::capi (the C interface, shared) or
# moerun::moerun (C++, static).
set_target_properties(moerun_c PROPERTIES EXPORT_NAME capi)
install(TARGETS moerun moerun_c EXPORT moerunTargets
  ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR}
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(FILES capi/moerun.h DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(DIRECTORY base device expert io metrics model plan predict replay trace weights
  DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/moerun
  FILES_MATCHING PATTERN "*.h" PATTERN "kernels_*" EXCLUDE)

set(_package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/moerun)
install(EXPORT moerunTargets NAMESPACE moerun:: DESTINATION ${_package_dir})
configure_package_config_file(moerunConfig.cmake.in moerunConfig.cmake
  INSTALL_DESTINATION ${_package_dir})
write_basic_package_version_file(moerunConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES
  ${CMAKE_CURRENT_BINARY_DIR}/moerunConfig.cmake
  ${CMAKE_CURRENT_BINARY_DIR}/moerunConfigVersion.cmake
  DESTINATION ${_package_dir})
